"""Small models' weights in the formats of other implementations, and a server that publishes files."""

import contextlib
import functools
import http.server
import threading

import numpy as np
import reference
import torch
from small import options
from tf_bundle import SUFFIX, write_bundle

from kmax_d2.checkpoint import deeplab2, pytorch_port

# The first classes of Cityscapes are stuff and the last are things, so that their order shows.
CITYSCAPES = {"DATASETS__TEST": ("cityscapes_fine_panoptic_val",), "MODEL__KMAX__NUM_CLASSES": 19}
# What the public PyTorch re-implementation's weights need.
PORT_OPTIONS = {"MODEL__KMAX__RESNET__STANDARD": True, "MODEL__KMAX__PIXEL_DECODER__DILATION": 1}


def build(**changes):
    """A small model with Cityscapes' classes, in inference mode; its weights are random, batch norms' too."""
    every = CITYSCAPES | {"MODEL__KMAX__NORM": "BN"} | changes
    return randomize(reference.build("", *options(**every)))


def randomize(model):
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_()
    return model


def weights(model):
    """What a file must give: everything but the counts of batches."""
    return {name: value.clone() for name, value in model.state_dict().items() if "num_batches_tracked" not in name}


def official_variables(model):
    """A model's weights as the official repository saves them: its names, its layouts, its order of classes."""
    is_thing = model.merging.is_thing.tolist()
    order = sorted(range(len(is_thing)), key=lambda index: not is_thing[index])
    state_dict, variables = model.state_dict(), {}
    for name in reference.shapes("variables_coco_r50"):
        ours = deeplab2.state_dict_name(name)
        if ours not in state_dict:
            continue
        array = state_dict[ours].numpy()
        if ".class_head." in ours:
            array = array[[*order, len(order)]]
        if ours.startswith("semantic_head.classifier."):
            array = np.concatenate([array[-1:], array[:-1]])
        kind = name.rsplit("/", 1)[-1]
        if kind == "cluster_centers":
            array = array[None]
        elif kind == "depthwise_kernel":
            array = array.transpose(2, 3, 0, 1)
        elif kind.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T[None]
        variables[name] = array
    return variables


def port_state_dict(model):
    """A model's weights as the public PyTorch re-implementation saves them."""
    state_dict, entries = model.state_dict(), {}
    for name, shape in reference.shapes("state_dict_coco_r50").items():
        ours = pytorch_port.state_dict_name(name)
        ours = ours if ours in state_dict else ours.replace(".conv.", ".linear.")
        if ours not in state_dict:
            continue
        tensor = state_dict[ours].clone()
        if name.endswith("_cluster_centers.weight"):
            tensor = tensor.T
        elif len(shape) == 3:
            tensor = tensor[..., 0] if tensor.ndim == 4 else tensor[..., None]
        entries[name] = tensor
    return entries


def write_checkpoint(prefix, variables):
    """A TensorFlow checkpoint in two shards, with a counter and a slot of the optimizer as training leaves them."""
    tensors = {name + SUFFIX: (number % 2, array) for number, (name, array) in enumerate(variables.items())}
    first = next(iter(variables))
    tensors[f"{first}/.OPTIMIZER_SLOT/optimizer/m{SUFFIX}"] = (0, np.zeros(3, np.float32))
    tensors[f"global_step{SUFFIX}"] = (0, np.array(150000, np.int64))
    write_bundle(prefix, tensors, num_shards=2)


def assert_loaded(model, expected):
    """Checks that a model's weights, all but the counts of batches, equal `expected`."""
    actual = weights(model)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


class Publisher(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.fault` changes what it sends."""

    def do_GET(self):
        fault = self.server.fault
        if fault is None:
            super().do_GET()
            return
        file = self.translate_path(self.path)
        with open(file, "rb") as stream:
            content = stream.read()
        page = b"<!DOCTYPE html><html><body>Please log in to the network</body></html>"
        body = page if fault == "page" else content[: len(content) // 2]
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(page if fault == "page" else content)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def server(folder):
    """Publishes `folder` below the address `server.address` until `server.stop()` or the end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Publisher, directory=str(folder))) as web:
        web.fault = None
        web.address = f"http://127.0.0.1:{web.server_port}"
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def stop():
            web.shutdown()
            web.server_close()
            thread.join()

        web.stop = stop
        try:
            yield web
        finally:
            if thread.is_alive():
                stop()
