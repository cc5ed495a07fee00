"""Finds before a run starts what would stop it hours later."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ..errors import UserError
from ..images import oriented_size

MOST = 20_000  # records whose files are opened; of a larger dataset, as many evenly spaced ones


def require_readable(name: str, records: Sequence[dict]) -> None:
    """Raises UserError if images or PNGs of a dataset are missing, of another kind, or of another size than it says.

    Only the headers of the files are read, in parallel, which takes seconds. `check_dataset` reads the files whole.
    """
    records = records[:: 1 + len(records) // MOST]
    with ThreadPoolExecutor(16) as pool:
        faults = [fault for fault in pool.map(_fault, records) if fault]
    if faults:
        count = f"{len(faults)} of {len(records)} samples" if len(faults) > 1 else "a sample"
        raise UserError(
            f"the dataset {name} has {count} that cannot be used: {faults[0]}; "
            "python -m kmax_d2.tools.check_dataset lists everything that is wrong with a dataset"
        )


def _fault(record: dict) -> str:
    """Says what is wrong with the files of a record; an empty string if nothing is."""
    wanted = (record.get("width"), record.get("height"))
    for key in ("file_name", "pan_seg_file_name"):
        if key not in record:
            continue
        file = record[key]
        try:
            with Image.open(file) as image:
                size, mode = oriented_size(image), image.mode
        except Exception as error:  # Pillow's readers raise almost anything
            return f"cannot read {file}: {getattr(error, 'strerror', None) or error}"
        if None not in wanted and size != wanted:
            return f"{file} is {size[0]}×{size[1]}, but its record says {wanted[0]}×{wanted[1]}"
        if key == "pan_seg_file_name" and mode not in ("RGB", "RGBA", "P"):
            return f"{file} is no panoptic PNG: its mode is {mode}, not RGB"
    return ""
