"""The model card: README.md of an exported model in the form of the Hugging Face Hub, to which it can be uploaded.

In: the records of a finished run. Out: `export/best/README.md`, with copies of two of the run's pictures. It names no
paths, hosts or users. Texts that people have chosen, such as names of classes, are escaped.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mnist.config import TrainConfig, fields_on_resume, to_flat
from mnist.data.sources import DatasetInfo
from mnist.recipes import RECIPES
from mnist.runs.console import count
from mnist.runs.export import CARD
from mnist.runs.records import RunRecord
from mnist.runs.report import worst_classes
from mnist.runs.result import Result
from mnist.system.files import read_json, write_atomically
from mnist.training.metrics import Scores

ON_THE_HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "folder": "imagefolder",  # what the Hub calls people's own pictures
}
PICTURES = {"curves": "Loss and accuracy while it was trained", "mistakes": "Its most confident mistakes"}

_LOADING = """\
## How to load it

```bash
hf download USER/NAME --local-dir model
```

The code of the network is in the repository that has trained it, the one with `train_ddp.py`. There, or with that
folder in `PYTHONPATH`:

```python
from pathlib import Path

import torch

from mnist.runs.export import load_model

trained = load_model(Path("model"))  # checks the sha256 of the weights
images = torch.zeros(1, {shape}, dtype=torch.uint8)  # any number of images
probabilities = trained.model(trained.transform(images)).softmax(dim=1)
print(probabilities.argmax(dim=1), probabilities.amax(dim=1))
```

`python -m mnist.predict digit.png --run model` reads a picture, `python -m mnist.evaluate --run model` scores it again.
"""


def write_card(result: Result, config: TrainConfig, info: DatasetInfo, warn: Callable[[str], None]) -> None:
    """Writes the card of a finished run's best model. Rank 0 alone calls it. Whatever fails is a warning."""
    folder = result.run_dir / "export" / "best"
    try:
        pictures = _copy_pictures(result.run_dir / "pictures", folder) if config.output.pictures else []
        environment = read_json(result.run_dir / "environment.json")
        write_atomically(folder / CARD, render(result, config, environment, info, pictures).encode())
    except Exception as error:  # a full disk, a damaged record: the model itself is there
        warn(f"no model card: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def render(
    result: Result, config: TrainConfig, environment: dict[str, Any], info: DatasetInfo, pictures: Sequence[str]
) -> str:
    """The text of a card.

    Args:
        result: of the finished run.
        config: of the run.
        environment: what environment.json says.
        info: of the data set that it was trained on.
        pictures: names in `PICTURES` that lie beside the card.
    """
    record, test = result.record, result.test
    assert test is not None
    shape = ", ".join(map(str, info.image_shape)).removeprefix("1, ")
    metadata = yaml.safe_dump(_metadata(record, test), sort_keys=False, allow_unicode=True, width=120)
    shown = [f"![{PICTURES[name]}]({name}.png)\n" for name in pictures]
    parts = [
        f"---\n{metadata}---\n",
        f"# {escape(f'{record.recipe}-{record.dataset}')}\n",
        _summary(record, test, config, info),
        "## How it was trained\n",
        f"```bash\n{command(config, record.world_size)}\n```\n",
        _training(record, config, environment),
        *shown,
        _LOADING.format(shape=shape),
    ]
    return "\n".join(parts)


def escape(text: str) -> str:
    """Text in one line of Markdown that shows as it is: no markup, no HTML, no cell of a table."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|~&#!$@])", r"\\\1", line)


def command(config: TrainConfig, num_processes: int) -> str:
    """The command line that trains the same model: a recipe, and the fields that differ from it.

    Fields that change nothing, such as folders and trackers, are left out.
    """
    kinds = fields_on_resume("fixed") + fields_on_resume("course") + fields_on_resume("noted")
    known = RECIPES.get(config.recipe, RECIPES["fast"])()  # one that its owner made in Python has no name here
    as_in_recipe = {**_resolved(known), "recipe": config.recipe}
    words = ["--recipe", known.recipe]
    for name, value in _resolved(config).items():
        if name in kinds and value != as_in_recipe[name]:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = ["WEIGHTS"] if name == "init_from" else value if isinstance(value, list) else [value]
                words += [f"--{flag}", *map(str, values)]
    words += ["--data-dir", "PICTURES"] if config.data.dataset == "folder" else []
    start = "python train_ddp.py"
    if num_processes > 1:
        start = f"torchrun --local-addr localhost --nproc-per-node {num_processes} train_ddp.py"
    return f"{start} {shlex.join(words)}"


def _resolved(config: TrainConfig) -> dict[str, Any]:
    """The fields of a configuration, with what a launcher that says nothing fills in."""
    flat = to_flat(config)
    defaults = {"mixed_precision": "no", "gradient_accumulation_steps": 1}
    return {**flat, **{name: flat[name] or value for name, value in defaults.items()}}


def _metadata(record: RunRecord, test: Scores) -> dict[str, Any]:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    dataset_id = ON_THE_HUB.get(record.dataset, record.dataset)
    conditions = f"test accuracy on {test.num_samples} images, {record.precision}, seed {record.seed}"
    score = {"type": "accuracy", "value": round(test.accuracy, 6), "name": conditions}
    task = "image-classification"
    return {
        "license": "mit",
        "library_name": "pytorch",
        "pipeline_tag": task,
        "tags": [task, "accelerate", "safetensors", record.dataset],
        "datasets": [dataset_id],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": f"{record.recipe}-{record.dataset}",
                "results": [
                    {
                        "task": {"type": task, "name": "Image classification"},
                        "dataset": {"type": dataset_id, "name": record.dataset, "split": "test"},
                        "metrics": [score],
                    }
                ],
            }
        ],
    }


def _summary(record: RunRecord, test: Scores, config: TrainConfig, info: DatasetInfo) -> str:
    """What it is, and how good, with the conditions of the number."""
    channels, height, width = info.image_shape
    kind = "grey" if channels == 1 else f"{channels}-channel"
    worst = escape(worst_classes(test, info.class_names))
    ground = " (0 is paper)" if info.has_digits else ""
    chosen = "those with the best accuracy on held-out training images" if config.data.val_size else "the last ones"
    rows = [
        ("accuracy", f"**{test.accuracy:.2%}**: {test.num_correct:,} of {test.num_samples:,} test images"),
        ("conditions", f"one run, seed {record.seed}, {record.precision}; another seed gives another number"),
        ("weights", f"{chosen}; each test image was scored once"),
        ("lowest accuracy", worst or "none: all classes are right"),
        ("classes", ", ".join(escape(name) for name in info.class_names)),
        ("input", f"{height}x{width} {kind} pixels, 0 to 255, as the data set has them{ground}"),
    ]
    name = "a folder of pictures" if record.dataset == "folder" else escape(record.dataset)
    intro = f"The network `{config.optim.model}` ({record.num_params:,} parameters), trained on {name} with Accelerate."
    return "\n".join([intro, "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""])


def _training(record: RunRecord, config: TrainConfig, environment: dict[str, Any]) -> str:
    device = escape(str(environment["ranks"][0]["device"]))
    threads = count(int(environment["threads_per_process"]), "thread")
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "accelerate"))
    epochs = f"{record.epochs:g} {'epoch' if record.epochs == 1 else 'epochs'}"
    begun = " It began with the weights of another run (WEIGHTS)." if config.optim.init_from else ""
    return (
        f"{count(record.steps, 'step')} of {config.loop.global_batch_size} images ({epochs}) in "
        f"{record.train_time_s:.1f} s, without evaluation; {count(record.world_size, 'process')}, {device}, {threads} "
        f"each; {record.precision}; {escape(versions)}; code {escape(str(environment['git_commit']))}.{begun}\n"
    )


def _copy_pictures(source: Path, folder: Path) -> list[str]:
    """Copies the pictures that were drawn to the card; returns their names."""
    names = [name for name in PICTURES if (source / f"{name}.png").is_file()]
    for name in names:
        (folder / f"{name}.png").unlink(missing_ok=True)  # perhaps a symbolic link
        shutil.copyfile(source / f"{name}.png", folder / f"{name}.png")
    return names
