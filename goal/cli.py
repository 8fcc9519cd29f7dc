"""The command `goal`: train an objective, compare all objectives, evaluate embeddings, inspect data."""

import argparse
import importlib
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import goal
from goal import data, offline
from goal.data.audio_visual import holds_clips
from goal.data.files import Busy, alone, folder_name, read_array, write_atomically
from goal.data.pairs import read_image_of
from goal.data.terminal import unfailing
from goal.distributed import joined
from goal.evaluation import evaluate
from goal.spec import member, split
from goal.training import Incomplete, Sweep, TrainConfig, TrainingError, search, train
from goal.training.config import MOST, SETTINGS, WORDS, Setting, alternatives, merged, read_settings
from goal.training.display import outcome
from goal.training.folder import Row, best
from goal.training.report import RunRecord, terminal_table
from goal.training.systems import SYSTEMS
from goal.training.trained import load_trained, score
from goal.validation import whole_number

EXTRAS = {"mine": "mine", "data": "build"}  # that bring what a command needs; of the others, train
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run `goal` with these arguments, by default those of the process, and return the exit code.

    0: done. 1: training failed, where the message says. 2: something is wrong with what was asked for. 130: Ctrl-C.

    >>> main(["eval", "nowhere"])
    2
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stdout, whose number no file of ours may take
        os.set_inheritable(free, True)  # nor one of a worker's
    os.close(free)
    with unfailing(), warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(list(sys.argv[1:] if argv is None else argv))


def _warn(message: Warning | str, *place: Any, **more: Any) -> None:
    print(f"goal: {message}", file=sys.stderr)  # where in the code is of no use here


def _run(arguments: Sequence[str]) -> int:
    command = shlex.join([*_beginning(), *arguments])
    options = _parser().parse_args(arguments)
    try:
        options.run(options, command)
    except ImportError as error:
        extra = EXTRAS.get(options.command, "train")
        hint = "" if "pip install" in str(error) else f". It comes with: pip install 'goal-objectives[{extra}]'"
        print(f"goal {options.command}: {error}{hint}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OverflowError) as error:
        print(f"goal {options.command}: {error}", file=sys.stderr)
        return 2
    except (TrainingError, Busy, OSError, MemoryError) as error:
        print(f"goal {options.command}: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        print(f"goal {options.command}: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except Warning as error:  # where Python was told to make errors of them
        print(f"goal {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nStopped. The same command goes on from what was saved last: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _beginning() -> list[str]:
    """How this process was started, up to the arguments."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["goal"]
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "goal"]


# ---- commands --------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, command: str) -> None:
    config = TrainConfig(**_settings(options))
    if whole_number("--tune", options.tune, 0, MOST):
        if options.distributed:
            raise ValueError("--tune must be 0 with --distributed: the trials of a search run in one process.")
        config = search(config, options.tune, options.root / "trials" / config.run_name, options.save_every)
        print(outcome(config), flush=True)
    folder = options.root / (config.run_name if options.name is None else folder_name("--name", options.name))
    with _ranks(options.distributed, config.device) as first, _progress(config, first) as show:
        record = train(
            config,
            folder,
            options.save_every,
            diagnose=options.diagnose,
            distributed=options.distributed,
            on_evaluation=show,
        )
    if not first:
        return
    test = " ".join(f"{name} {value:.1f}" for name, value in record["test"].items())
    metric = "MAP@all" if "best_val_map" in record else "RSUM"
    print(
        f"{config.setting}\n{record['label']}, seed {config.seed}: best validation {metric} {best(record):.1f} ", end=""
    )
    print(f"at step {record['best_step']} of {record['steps']}\ntest: {test}\n{folder}")


@contextmanager
def _ranks(distributed: bool, device: str) -> Iterator[bool]:
    """The process group that torchrun has prepared, if it is asked for; whether this is the rank that speaks."""
    if not distributed:
        if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(f"--distributed must be given: torchrun has started {size} processes.")
        yield True
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("--distributed must be started by torchrun --nproc-per-node 2 -m goal train --distributed …")
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with joined("nccl" if device.startswith("cuda") else "gloo"):
        yield int(os.environ["RANK"]) == 0


def _sweep(options: argparse.Namespace, command: str) -> None:
    sweep = Sweep(
        quick=options.quick,
        seeds=options.seeds,
        trials=options.tune,
        objectives=options.objectives,
        name=options.name,
        root=options.root,
        workers=options.workers,
        save_every=options.save_every,
        **_settings(options),
    )
    print(f"{len(sweep.entries)} objectives, {sweep.seeds} seeds each, into {sweep.folder}", flush=True)
    print(sweep.note(), flush=True)
    failed = None
    try:
        sweep.run(command)
    except Incomplete as error:
        failed = error
    if records := sweep.records():
        print(f"\n{terminal_table(cast(Sequence[RunRecord], records), color=sys.stdout.isatty())}\n")
        print(sweep.note(command))
        print(f"Tables and pictures: {sweep.folder / 'table.md'} and beside it")
    if failed is not None:
        raise failed


def _eval(options: argparse.Namespace, command: str) -> None:
    if (options.run_dir is None) == (options.x is None) or (options.x is None) != (options.y is None):
        raise ValueError("give a run's folder, or both --x and --y")
    if options.run_dir is not None:
        if options.leave_one_out:
            raise ValueError("--leave-one-out must go with the files --x and --y, not with a run.")
        run = load_trained(options.run_dir, device=options.device, data=options.data)
        metrics = score(run.config, run.model, run.split(options.split), options.folds)
    else:
        pairs = data.paired(options.x, options.y, options.image_of)
        assert pairs.y is not None
        metrics = evaluate(
            pairs.x,
            pairs.y,
            pairs.image_of,
            similarity=options.similarity,
            folds=options.folds,
            leave_one_out=options.leave_one_out,
        )
    print("\n".join(str(metrics).split(" | ")))


def _mine(options: argparse.Namespace, command: str) -> None:
    if not 0 < options.memory * 1e9 < math.inf:
        raise ValueError(f"--memory must be a finite number of gigabytes > 0, got {options.memory}.")
    image_of = None
    if options.image_of is not None:
        n, m = (np.atleast_1d(read_array(path, "features")).shape[0] for path in (options.images, options.texts))
        image_of = read_image_of(options.image_of, n, m)
    out = offline.mine(
        options.images,
        options.texts,
        options.k,
        out=options.out,
        y_ids=image_of,
        similarity=options.similarity,
        memory=round(options.memory * 1e9),
        device=options.device,
        save_every=options.save_every,
    )
    print(out)


def _build(options: argparse.Namespace, command: str) -> None:
    out = options.out or Path(options.dataset)
    source = {} if options.package is None else {"package": options.package}
    if source and options.dataset != "tuxpaint":
        raise ValueError(f"--package must go with tuxpaint: {options.dataset} is not made from one.")
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            importlib.import_module(f"goal.data.build_{options.dataset.replace('-', '_')}").build(out, **source)
    except BaseException:
        with suppress(OSError):
            for folder in new:  # an empty one is no dataset; where something was made already, it stays
                folder.rmdir()
        raise
    print(out)


def _info(options: argparse.Namespace, command: str) -> None:
    describe = _clips_line if holds_clips(options.dataset) else _pairs_line
    for name in ("train", "val", "test"):
        print(describe(options.dataset, name))


def _pairs_line(dataset: str, name: str) -> str:
    pairs = data.load(dataset, name)
    captions = "no features" if pairs.y is None else f"features {pairs.y.shape}"
    return f"{pairs.split:5}  {len(pairs.x)} images {pairs.x.shape}  {len(pairs.image_of)} captions, {captions}"


def _clips_line(dataset: str, name: str) -> str:
    clips = data.clips(dataset, name)
    classes = len(set(clips.labels.tolist()))
    arrays = f"audio {clips.audio.shape}, visual {clips.visual.shape}"
    return f"{name:5}  {len(clips.labels)} clips of {classes} classes  {arrays}"


def _lab_table(options: argparse.Namespace, command: str) -> None:
    from goal import lab

    table = lab.table()
    print(table)
    if options.out is not None:
        lab.gallery(table, options.out)
        print(options.out)


def _lab_show(options: argparse.Namespace, command: str) -> None:
    from goal import lab

    T, P = _terms(options)
    found = lab.integrability(T, P)
    print(found)
    out = options.out or Path(f"{T.name}-{P.name}.png")
    lab.show(found, out)
    print(out)
    if options.html:
        page = out.with_suffix(".html")
        write_atomically(page, lab.page(T, P).encode())
        print(page)


def _lab_simulate(options: argparse.Namespace, command: str) -> None:
    from goal.lab.dynamics import compare, plot_simulations, table

    T, P = _terms(options)
    settings = {name: getattr(options, name) for name in ("start", "model", "n", "d", "steps", "lr", "noise", "seed")}
    runs = compare([(T, P, _rule(mining)) for mining in options.mining], **settings)
    print(table(runs))
    at = sorted({round(options.steps * k / 10) for k in range(11)})
    width = max(len(run.label) for run in runs)
    for name, series in (("gradient", "gradient"), ("gradient's part along the spheres", "force")):
        print(f"\nnorm of the {name}\n{'step':<{width}} " + " ".join(f"{step:>7}" for step in at))
        for run in runs:
            print(f"{run.label:<{width}} " + " ".join(f"{getattr(run, series)[step]:7.1e}" for step in at))
    if options.out is not None:
        plot_simulations(runs, options.out)
        print(options.out)


def _discover(options: argparse.Namespace, command: str) -> None:
    from goal.lab import discover

    found = discover(
        quick=options.quick,
        trials=options.trials,
        seeds=options.seeds,
        name=options.name,
        root=options.root,
        workers=options.workers,
        save_every=options.save_every,
        command=command,
        **_settings(options),
    )
    print(f"\n{found}\n\nThe whole report: {found.folder / 'discovery.md'}; the terms to paste: found.py beside it")


def _rule(text: str) -> Any:
    """A mining rule by its name, or with parameters."""
    return cast(goal.Objective, goal.objective(f"con × con | {text}")).settings.mining if "(" in text else text


def _terms(options: argparse.Namespace) -> tuple[Any, Any]:
    """The terms that --T and --P name, with the parameters that were given."""
    given = _given(options)
    parts = goal.T[options.T], goal.P[options.P]
    if stray := [name for name in given if not any(name in part.defaults for part in parts)]:
        known = ", ".join(dict.fromkeys(name for part in parts for name in part.defaults)) or "none"
        raise ValueError(f"{options.T} × {options.P} has no parameter --{stray[0]}; its parameters: {known}")
    T, P = (part(**{name: value for name, value in given.items() if name in part.defaults}) for part in parts)
    return T, P


def _models(options: argparse.Namespace, command: str) -> None:
    for name in SYSTEMS:
        config = TrainConfig(model=name)
        epoch, first_epochs = config.optimiser.drop_epoch, config.objective.all_first
        rate = "" if epoch is None else f", a tenth of the rate from epoch {epoch}"
        first = f"; {first_epochs} epoch of all negatives first" if first_epochs else ""
        print(f"{name:13} {config.setting}{rate}\n{'':13} {config.label}{first}; {SYSTEMS[name].what}")


def _recipes(options: argparse.Namespace, command: str) -> None:
    for name in goal.recipes():
        print(f"{name:18} {goal.recipe(name)!r}")


# ---- arguments -------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="goal", description="Objectives that live in gradient space: train, compare, evaluate."
    )
    parser.add_argument("--version", action="version", version=f"goal {goal.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, help: str, run: Callable[[argparse.Namespace, str], None], within: Any = commands, more: str = ""
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = within.add_parser(
            name, help=help, description=help + more, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("train", "train one objective; the same command continues a run that was stopped", _train)
    _add_settings(sub, without=())
    torchrun = "one rank of many: torchrun --nproc-per-node 4 -m goal train --distributed …"
    sub.add_argument("--distributed", action="store_true", help=torchrun)
    sub.add_argument(
        "--diagnose", type=int, default=0, metavar="N", help="watch similarities and gradients every N steps"
    )
    sub.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="search the objective's parameters and the rate first",
    )
    _add_parameters(sub, ("T", "P", "recipe"))
    _add_folder(sub)

    sub = command("sweep", "train every T × P and every recipe and tell which wins; resumes as train does", _sweep)
    sub.add_argument("--quick", action="store_true", help="small heads and few seeds: minutes instead of an hour")
    sub.add_argument("--seeds", type=int, help="how many seeds; by default 5, or 2 with --quick")
    sub.add_argument("--tune", type=int, default=0, metavar="N", help="give every objective a search of N trials too")
    sub.add_argument(
        "--objectives",
        type=split,
        metavar="A,B",
        help="only these: cir:sig-ms,vse++,infonce(tau=30)",
    )
    sub.add_argument("--workers", type=int, help="processes; by default one for each core")
    _add_settings(sub, without=("objective", *(word for word in WORDS if word != "reduction"), "seed"))
    _add_folder(sub)

    ties = "; ties: queries whose best right candidate scores as a wrong one does, which counts against it"
    sub = command("eval", "score a run, or two files of embeddings", _eval, more=ties)
    sub.add_argument("run_dir", nargs="?", type=Path, help="folder of a run of train or sweep")
    sub.add_argument("--split", default="test", help="split that a run is scored on")
    sub.add_argument("--data", help="what a run is scored on; by default the data that it was trained on")
    sub.add_argument("--device", help="where a run is scored; by default where it was trained, if that is there")
    sub.add_argument("--x", type=Path, help="image embeddings, .npy or .safetensors")
    sub.add_argument("--y", type=Path, help="caption embeddings")
    sub.add_argument("--image-of", type=Path, help="row of x for each row of y; without it equally many, in order")
    sub.add_argument("--similarity", default="cosine", help="of the files: cosine, dot or order")
    sub.add_argument("--folds", type=int, default=1, help="average over so many equal parts (COCO 1K: 5)")
    one_set = "both files are one set: row k of y is no candidate for row k of x, and --image-of names another row"
    sub.add_argument("--leave-one-out", action="store_true", help=one_set)

    sub = command("mine", "write the k hardest negatives of each row of two files of embeddings; resumes", _mine)
    sub.add_argument("--images", type=Path, required=True, help="(N, D) embeddings, .npy")
    sub.add_argument("--texts", type=Path, required=True, help="(M, D) embeddings, .npy")
    sub.add_argument("-k", type=int, default=10, help="negatives of each row; rows that have fewer get -1 in .npz")
    sub.add_argument("--out", type=Path, required=True, help="file to write: .parquet, .csv or .npz")
    sub.add_argument("--image-of", type=Path, help="row of images for each text; without it equally many, in order")
    sub.add_argument("--similarity", default="cosine", help="cosine, dot or order")
    sub.add_argument("--memory", type=float, default=1.0, help="gigabytes (10⁹ bytes) to use")
    sub.add_argument("--device", default="cpu", help="where products are made")
    sub.add_argument("--save-every", type=float, default=30.0, help="seconds between saves of what is known so far")

    datasets = commands.add_parser("data", help="build or describe data").add_subparsers(required=True)
    sub = command("build", "make a dataset from ordinary packages", _build, within=datasets)
    sub.add_argument("dataset", choices=["emoji", "emoji-grid", "tuxpaint"])
    sub.add_argument("--out", type=Path, help="folder to write; by default named as the dataset")
    sub.add_argument("--package", type=Path, help="tuxpaint: the file of its package; by default apt-get fetches it")
    sub = command("info", "what a dataset or a folder of features holds", _info, within=datasets)
    sub.add_argument("dataset", help="emoji, or a folder")

    command("models", "the systems that train and sweep know, and their settings", _models)
    command("recipes", "the objectives of the literature by name", _recipes)

    sub = command("discover", "search for terms that beat the published ones; resumes as train does", _discover)
    sub.add_argument("--quick", action="store_true", help="small heads and few trials: minutes instead of hours")
    sub.add_argument("--trials", type=int, help="of each of the two searches; by default 150, or 40 with --quick")
    sub.add_argument("--seeds", type=int, default=5, help="with which what was found is tested")
    sub.add_argument("--workers", type=int, help="processes; by default one for each core")
    _add_settings(sub, without=("objective", *(word for word in WORDS if word != "reduction"), "seed"))
    _add_folder(sub)

    labs = commands.add_parser("lab", help="see and prove what an objective is").add_subparsers(required=True)
    sub = command("table", "which loss each T × P is, or that it is none", _lab_table, within=labs)
    sub.add_argument("--out", type=Path, help="draw all of them into this file too (.png, .svg, .pdf)")
    sub = command("show", "draw one T × P: its weights, field, curl, loss, trajectories", _lab_show, within=labs)
    _add_terms(sub)
    sub.add_argument("--out", type=Path, help="file to draw into (.png, .svg, .pdf); by default T-P.png")
    sub.add_argument("--html", action="store_true", help="write an interactive page beside it, too")
    sub = command(
        "simulate", "let points on spheres descend under an objective, no network", _lab_simulate, within=labs
    )
    _add_terms(sub)
    sub.add_argument("--mining", nargs="+", default=["hardest"], help="one or more, side by side")
    sub.add_argument("--start", default="collapsed", help="collapsed, random or clustered")
    sub.add_argument("--model", default="points", help="points: they move freely; map: one tanh map moves them all")
    for name, default, help in (("n", 64, "pairs"), ("d", 16, "dimensions"), ("steps", 400, "of descent"),
                                ("seed", 0, "of the start")):  # fmt: skip
        sub.add_argument(f"--{name}", type=int, default=default, help=help)
    sub.add_argument("--lr", type=float, help="learning rate; by default 0.1 for points, 1 for a map")
    sub.add_argument("--noise", type=float, default=0.1, help="of the start, relative to the points' length")
    sub.add_argument("--out", type=Path, help="file to draw into")
    return parser


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str]) -> None:
    """An option for each setting of `TrainConfig`, and a file of them."""
    group = parser.add_argument_group("settings of a run")
    group.add_argument("--config", type=Path, metavar="FILE", help=".toml or .json with settings; options go over it")
    for name, help in INSTEAD.items():
        if name not in without:
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help)
    for name, setting in SETTINGS.items():
        if name in without:
            continue
        default = f" (default: {setting.field.default})" if setting.field.default is not None else ""
        names = [f"--{name.replace('_', '-')}", *(["--optimizer"] if name == "optimiser" else [])]
        help = setting.field.metadata["help"] + default
        group.add_argument(*names, type=_type(setting), default=argparse.SUPPRESS, help=help)


INSTEAD = {  # of --objective
    "T": "triplet weight, in place of --objective",
    "P": "pair weight, in place of --objective",
    "recipe": "a recipe of the literature, in place of --objective",
    "mining": "negatives that it meets: hardest, semi-hard, all, selective, or with parameters, selective(eps=0.1)",
    "reduction": "mean or sum over the batch",
}


def _type(setting: Setting) -> Any:
    """What makes a setting of an argument's text."""
    return next((kind for kind in (int, float) if kind in alternatives(setting.hint)), str)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run: those of the file that --config names, and over them those of the command."""
    given = {name: value for name, value in vars(options).items() if name in SETTINGS or name in WORDS}
    if params := _given(options):
        given["params"] = params
    return given if options.config is None else merged(read_settings(options.config), given)


def _given(options: argparse.Namespace) -> dict[str, float]:
    """The parameters of an objective that were given as options of their own."""
    return {name.removeprefix("param "): value for name, value in vars(options).items() if name.startswith("param ")}


def _add_parameters(parser: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """An option for each number that a registered term or a recipe has, unless another option has its name."""
    owners: dict[str, dict[str, None]] = {}
    for kind in kinds:
        for name in {"T": goal.T, "P": goal.P}.get(kind, goal.recipes()):
            for parameter, default in member(kind, name).defaults.items():
                if not isinstance(default, bool):
                    owners.setdefault(parameter, {})[name] = None
    group = parser.add_argument_group("parameters, which may stand in the objective too: cir(tau=5) × sig-ms")
    for parameter, names in owners.items():
        with suppress(argparse.ArgumentError):
            help = f"of {', '.join(names)}"
            option, dest = f"--{parameter.replace('_', '-')}", f"param {parameter}"
            group.add_argument(option, type=float, default=argparse.SUPPRESS, dest=dest, metavar="X", help=help)


def _add_terms(parser: argparse.ArgumentParser) -> None:
    """T, P and their parameters."""
    parser.add_argument("--T", required=True, help=f"triplet weight: {', '.join(goal.T)}")
    parser.add_argument("--P", required=True, help=f"pair weight: {', '.join(goal.P)}")
    _add_parameters(parser, ("T", "P"))


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="of the folder; by default made of what is asked for")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where the folder is made")
    parser.add_argument("--save-every", type=float, default=10.0, help="seconds between checkpoints of a run")


@contextmanager
def _progress(config: TrainConfig, speaks: bool) -> Iterator[Callable[[Row], None]]:
    """What to call after each evaluation of a run: a bar on a terminal, a line elsewhere."""
    if not speaks:
        yield lambda row: None
        return
    if not sys.stdout.isatty():
        yield lambda row: print(_line(row), flush=True)
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import Progress
    from rich.text import Text

    bar = Progress()
    task = bar.add_task(config.label, total=None)
    with Live(bar, transient=True) as live:

        def show(row: Row) -> None:
            bar.update(task, completed=row["step"], total=row["end"])
            live.update(Group(bar, Text(_line(row))))

        yield show


def _line(row: Row) -> str:
    score = f"RSUM {row['val_rsum']:.1f}" if "val_rsum" in row else f"MAP@all {row['val_map']:.1f}"
    stage = f"stage {row['stage']}  " if "stage" in row else ""
    return (
        f"step {row['step']}  {stage}loss {row['loss']:.3f}  validation {score}  "
        f"s⁺ {row['s_pos']:.2f}  s⁻ {row['s_neg']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
