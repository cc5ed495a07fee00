"""`kmax_d2.tools.convert` writes Detectron2 checkpoints that hold the same weights, and nothing else."""

import pickle

import published
import pytest
import torch
from published import PORT_OPTIONS, assert_loaded
from small import options

from kmax_d2.checkpoint import load_weights
from kmax_d2.errors import UserError
from kmax_d2.tools import convert


@pytest.fixture
def config(tmp_path):
    """A config file of the small model; options follow on the command line."""
    (tmp_path / "own.yaml").write_text("MODEL:\n  KMAX:\n    NORM: BN\n")
    return tmp_path / "own.yaml"


def run(config, source, output, **changes):
    every = [str(part) for part in options(**published.CITYSCAPES | changes)]
    convert.main([str(source), str(output), "--config-file", str(config), *every])


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
@pytest.mark.parametrize("kind", ["tensorflow", "port"])
def test_round_trip(config, tmp_path, capsys, kind, ending):
    changes = PORT_OPTIONS if kind == "port" else {}
    source = published.build(**changes)
    if kind == "port":
        file = tmp_path / "port.pth"
        torch.save({"model": published.port_state_dict(source)}, file)
    else:
        file = tmp_path / "ckpt-1"
        published.write_checkpoint(file, published.official_variables(source))
    output = tmp_path / "new" / f"model{ending}"
    run(config, file, output, **changes)
    run(config, file, output, **changes)  # over its own
    assert capsys.readouterr().out.endswith(f"836 weights written to {output}\n")
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    size = sum(value.numel() for value in published.weights(source).values()) * 4
    # A float each, the names, and the config: no storage beside the weights.
    assert size < output.stat().st_size < 1.5 * size + 2**15

    model = published.build(**changes)
    load_weights(model, str(output))
    assert_loaded(model, published.weights(source))
    image = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(model.predict(image)["class_logits"], source.predict(image)["class_logits"])


def test_a_pkl_is_what_detectron2_reads(config, tmp_path):
    source = published.build()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    run(config, tmp_path / "model.pth", tmp_path / "model.pkl")
    content = pickle.loads((tmp_path / "model.pkl").read_bytes())
    assert content.keys() == {"model", "__author__"}
    centers = source.state_dict()["transformer_decoder.centers"].numpy()
    assert (content["model"]["transformer_decoder.centers"] == centers).all()


def test_faults(config, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.pth or \.pkl, unlike .*model\.npz"):
        run(config, tmp_path / "none.pth", tmp_path / "model.npz")
    with pytest.raises(UserError, match=r"no checkpoint .*none\.pth"):
        run(config, tmp_path / "none.pth", tmp_path / "model.pth")
    torch.save(published.build().state_dict(), tmp_path / "model.pth")
    for output, message in (
        ("other.pth", r"other\.pth exists and was not made by kmax_d2"),
        ("model.pth", "the input"),
    ):
        (tmp_path / "other.pth").touch()
        with pytest.raises(UserError, match=message):
            run(config, tmp_path / "model.pth", tmp_path / output)
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot write .*taken"):
        run(config, tmp_path / "model.pth", tmp_path / "taken" / "model.pkl")
