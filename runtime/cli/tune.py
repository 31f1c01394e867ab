"""`pagemill tune`: measure the launch configurations of the Triton kernels on this GPU, and keep what is fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pagemill.cli.common import DebugOption, app, say, sentences, stderr
from pagemill.errors import ConfigError, printable

if TYPE_CHECKING:
    from pagemill.kernels.gpu.tune import Heads
    from pagemill.model.config import ModelConfig

_FORMS = ("plain", "int8", "fp8", "int4")


@app.command(
    epilog="[bold]Exit code[/] 0: measured. 2: no GPU that the kernels run on, or a model that is not known; 130: interrupted."
)
def tune(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Whose layers to measure: 3b, 7b, pagemill-tiny, or a folder."),
    ] = "3b",
    forms: Annotated[
        str | None,
        typer.Option(
            "--forms",
            metavar="FORM,...",
            help="Forms of the weights: plain (bfloat16), int8, fp8, int4; those that the GPU has by default.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="The GPU to measure.")] = "cuda",
    debug: DebugOption = False,
) -> None:
    """Measure which launch configurations of the Triton kernels are fastest on this GPU, and use them.

    Without it a table by architecture is used, which is good but general. It takes some minutes, most
    of them to compile candidates, wants the GPU for itself, and holds for this card, this version of
    Triton and these kernels. What was measured lies in the user's cache folder, a file a card; delete
    it to go back to the table.

    [bold]Examples[/]

        pagemill tune
        pagemill tune 7b --forms plain,int8
    """
    with sentences(debug):
        import torch

        from pagemill.cost.model import find_shape
        from pagemill.gpu import named_device
        from pagemill.kernels import select

        if (found := named_device(device)).type == "cpu":
            raise ConfigError("pagemill tune measures a GPU; the kernels of a CPU choose for themselves")
        select("triton", found, torch.bfloat16)  # raises where the kernels do not run
        config = find_shape(model)

        from pagemill.kernels.gpu import configs, tuned
        from pagemill.kernels.gpu.tune import Bench, products_of, tune

        card = configs.card_of(found)
        has_fp8 = torch.version.hip is None and torch.cuda.get_device_capability(found) >= (8, 9)
        known = [form for form in _FORMS if form != "fp8" or has_fp8]
        wanted = known if forms is None else forms.split(",")
        if strange := [form for form in wanted if form not in known]:
            raise ConfigError(f"--forms: {card.name} has no form {strange[0]!r}; it has {', '.join(known)}")
        products = products_of(_layers(config), wanted)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
            console=stderr, transient=True,
        ) as progress, torch.cuda.device(found):  # fmt: skip
            task = progress.add_task("measuring", total=len(products) + len(tuned.ATTENTION))
            bench = Bench(found, _heads(config))

            def measured(what: str) -> None:
                progress.update(task, advance=1, description=f"measured {what}")

            best = tune(card, products, bench.matmul, bench.attention, bench.unpack, measured)
        path = tuned.save(card.name, best)
        say(
            f"[bold]{escape(printable(str(path)))}[/]: {len(best.matmul)} products and {len(best.attention)} kinds of attention "
            f"on {escape(printable(card.name))}",
            markup=True,
        )


def _layers(config: ModelConfig) -> list[tuple[bool, int, int]]:
    """The linear layers of both halves of the model: gated pair or not, features, inputs."""
    text, vision = config.text, config.vision
    merged = vision.hidden_size * vision.spatial_merge_size**2
    layers = [
        (False, (text.num_heads + 2 * text.num_kv_heads) * text.head_dim, text.hidden_size),
        (False, text.hidden_size, text.num_heads * text.head_dim),
        (True, text.intermediate_size, text.hidden_size),
        (False, text.hidden_size, text.intermediate_size),
        (False, text.vocab_size, text.hidden_size),
        (False, vision.hidden_size, vision.patch_dim),
        (False, 3 * vision.hidden_size, vision.hidden_size),
        (False, vision.hidden_size, vision.hidden_size),
        (True, vision.intermediate_size, vision.hidden_size),
        (False, vision.hidden_size, vision.intermediate_size),
        (False, merged, merged),
        (False, vision.out_hidden_size, merged),
    ]
    return list(dict.fromkeys(layers))


def _heads(config: ModelConfig) -> Heads:
    from pagemill.kernels.gpu.tune import Heads

    text, vision = config.text, config.vision
    return Heads(text.num_heads, text.num_kv_heads, text.head_dim, vision.num_heads, vision.head_dim)
