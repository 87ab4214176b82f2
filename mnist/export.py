"""Writes a trained model as one file that needs no code of this project, as ONNX or as a program of torch.export.

    python -m mnist.export                                  model.onnx, beside the weights of the newest run
    python -m mnist.export --run runs/a --format torch      model.pt2, which PyTorch alone reads
    python -m mnist.export --output digits.onnx

In: an exported model. Out: a file that maps uint8 images (N, H, W), or (N, C, H, W) where they have several channels,
to probabilities (N, K); resizing, normalising and softmax are inside. It is written only if it answers as the model
does on all test images.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import timeit
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mnist.cli import RunOption, parse_options, run_command
from mnist.errors import RunError, UserError


@dataclass(frozen=True)
class Options:
    """What is written, and where."""

    run: RunOption = None
    """Run directory, or folder with an exported model; default: the newest finished run."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx = for ONNX Runtime and others; torch = a program of torch.export."""
    output: str | None = None
    """The file; default: model.onnx or model.pt2 beside the weights."""
    data_dir: str | None = None
    """Where the test images are; default: $MNIST_DATA_DIR, else the folder it was trained from."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "export", __doc__)  # before torch is imported: --help answers at once

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist.data import datasets
from mnist.data.batches import Split
from mnist.data.sources import is_present
from mnist.recipes import run_name
from mnist.runs.console import Console, count
from mnist.runs.export import CARD, ONNX, PT2, TrainedModel, find_export, load_model
from mnist.system.files import MAX_JSON_BYTES, read_regular, write_atomically

MAX_DIFFERENCE = 1e-3  # of a probability; rounding makes about 1e-6
BATCH = 1000  # images that are compared at a time
METADATA = "metadata.json"  # within a program of torch.export

Recogniser = Callable[[Tensor], Tensor]  # uint8 images -> probabilities

# What the model card says of each file.
_LOADING = {
    ONNX: """
## How to load it with ONNX Runtime alone

```python
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model/model.onnx")
about = session.get_modelmeta().custom_metadata_map
class_names = json.loads(about["class_names"])
images = np.zeros((1, {shape}), dtype=np.uint8)  # any number of images
(probabilities,) = session.run(None, {{"images": images}})
print(class_names[probabilities[0].argmax()], probabilities[0].max())
```
""",
    PT2: """
## How to load it with PyTorch alone

```python
import json

import torch

about = {{"metadata.json": ""}}
recogniser = torch.export.load("model/model.pt2", extra_files=about).module()
class_names = json.loads(json.loads(about["metadata.json"])["class_names"])
images = torch.zeros(1, {shape}, dtype=torch.uint8)  # any number of images
probabilities = recogniser(images)
print(class_names[probabilities[0].argmax()], probabilities[0].max())
```
""",
}


class WholeModel(nn.Module):
    """Preprocessing, network and softmax of a trained model."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.transform, self.network = trained.transform, trained.model

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W) or (N, C, H, W) -> probabilities (N, K)."""
        logits: Tensor = self.network(self.transform(images))
        return logits.softmax(dim=1)


@torch.no_grad()
def main(options: Options) -> int:
    """Writes the file, and prints how it compares with the model."""
    if options.format == "onnx":
        _require_onnx()
    console = Console()
    trained = load_model(find_export(options.run))
    usual_path = trained.folder / (ONNX if options.format == "onnx" else PT2)
    path = Path(options.output or usual_path)
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced
        raise UserError(f"--output {path}: not a file; name one, new or old")
    name, test = _test_images(trained, options.data_dir)
    for warning in filter(None, [trained.warning, _other_images(trained, name)]):
        console.warn(warning)
    model = WholeModel(trained).eval()
    expected = _answers(model, test)
    example = torch.zeros((2, *test.images.shape[1:]), dtype=torch.uint8)
    content = _convert(model, example, options.format, _metadata(trained, name, test, expected))
    recogniser = (_open_onnx if options.format == "onnx" else _open_torch)(content)
    largest_difference = _compare(path, expected, _answers(recogniser, test))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    num_right, shape = int((expected.argmax(dim=1) == test.labels).sum()), ", ".join(map(str, test.images.shape[1:]))
    if path.resolve() == usual_path.resolve():
        _add_to_card(trained.folder / CARD, _LOADING[path.name].format(shape=shape))
    agreement = f"{num_right:,} right and the same predictions as the model in torch"
    lines = [
        f"{path}: {len(content) / 1000:,.0f} kB",
        f"uint8 images (N, {shape}) -> probabilities (N, {expected.shape[1]})",
        f"{len(test):,} test images of {name}: {agreement}, probabilities within {largest_difference:.1e}",
        _times(recogniser, model, test),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _add_to_card(card: Path, section: str) -> None:
    """Adds a section to a model card, if there is one and it has none like it."""
    if card.is_file():
        text = read_regular(card, MAX_JSON_BYTES).decode()
        if section not in text:
            write_atomically(card, (text + section).encode())


def _require_onnx() -> None:
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        advice = "pip install onnx onnxscript onnxruntime, or give --format torch"
        raise UserError(f"--format onnx: no module {error.name}; {advice}") from error


def _test_images(trained: TrainedModel, data_dir: str | None) -> tuple[str, Split]:
    """Name and test images of the data set that it was trained on; where it is not here, the digits in its form."""
    config, info = replace(datasets.relocate(trained.config.data, None, data_dir), val_size=0), trained.info
    own = config.dataset
    try:
        if is_present(own, config.data_dir):
            found = datasets.read(own, config, size=info.image_shape[-1])
            if (found.info.image_shape, found.class_names) == (info.image_shape, info.class_names):
                return own, found.test
    except UserError:
        if own != "folder":  # people's own pictures may be gone
            raise
    digits = datasets.read("digits", config).test
    channels, height, width = info.image_shape
    images = F.interpolate(digits.images.unsqueeze(1).float(), (height, width), mode="bilinear", antialias=True)
    images = images.round().to(torch.uint8).expand(-1, channels, -1, -1)
    return "digits", Split(images.squeeze(1) if channels == 1 else images.contiguous(), digits.labels)


def _other_images(trained: TrainedModel, name: str) -> str | None:
    """That it is compared on other images than those that it was trained for, or None."""
    own = trained.config.data.dataset
    return None if name == own else f"compared on {name}: {own} is not here (--data-dir names the folder that has it)"


def _metadata(trained: TrainedModel, name: str, test: Split, expected: Tensor) -> dict[str, str]:
    """What the file says of itself; the accuracy where its own test images are here."""
    facts = {
        "class_names": json.dumps(trained.info.class_names),
        "dataset": trained.config.data.dataset,
        "recipe": run_name(trained.config),
        "network": trained.config.optim.model,
        "weights_sha256": trained.sha256,
    }
    if name == trained.config.data.dataset:
        facts["accuracy"] = f"{(expected.argmax(dim=1) == test.labels).float().mean():.6f}"
        facts["accuracy_on"] = f"{len(test)} test images of {name}"
    return facts


def _answers(recogniser: Recogniser, split: Split) -> Tensor:
    """Probabilities (N, K) of all images."""
    return torch.cat([recogniser(images) for images in split.images.split(BATCH)])


def _convert(model: WholeModel, images: Tensor, kind: str, metadata: dict[str, str]) -> bytes:
    """The content of the file; `images` show the shapes.

    Raises:
        RunError: the network has something that cannot be written so.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # it has paths of this machine
            return (_to_onnx if kind == "onnx" else _to_torch)(program, metadata)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise RunError(f"--format {kind}: this network cannot be written so ({reason})") from error


def _to_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    shapes = {"images": {0: "N"}}
    written = torch.onnx.export(
        program, dynamo=True, output_names=["probabilities"], dynamic_shapes=shapes, external_data=False, verbose=False
    )
    assert written is not None
    content = written.model_proto
    for key, value in metadata.items():
        content.metadata_props.add(key=key, value=value)
    return bytes(content.SerializeToString())


def _to_torch(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    return file.getvalue()


def _open_onnx(content: bytes) -> Recogniser:
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _open_torch(content: bytes) -> Recogniser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Recogniser = torch.export.load(io.BytesIO(content)).module()
    return module


def _compare(path: Path, expected: Tensor, found: Tensor) -> float:
    """The largest difference of a probability.

    Raises:
        RunError: another prediction, or a difference that rounding cannot explain.
    """
    num_others = int((found.argmax(dim=1) != expected.argmax(dim=1)).sum())
    largest = float((found - expected).abs().max())
    if num_others or not largest <= MAX_DIFFERENCE:
        raise RunError(
            f"{path}: not written: {num_others:,} of {len(expected):,} predictions differ from the model's, "
            f"probabilities by up to {largest:.1e}"
        )
    return largest


def _times(recogniser: Recogniser, model: WholeModel, split: Split) -> str:
    """A line on the mean time of an answer, beside that of the model in torch."""
    shown = []
    for images in (split.images[:1], split.images[:256]):
        times = [f"{1000 * _mean_time_s(answer, images):.2f} ms" for answer in (recogniser, model)]
        shown.append(f"{count(len(images), 'image')} {times[0]} (the model in torch {times[1]})")
    threads = torch.get_num_threads()
    return f"mean time of an answer, {count(threads, 'thread')}: {', '.join(shown)}"


def _mean_time_s(answer: Recogniser, images: Tensor) -> float:
    num_answers, seconds = timeit.Timer(lambda: answer(images)).autorange()
    return seconds / num_answers


if __name__ == "__main__":
    run_command(main, OPTIONS)
