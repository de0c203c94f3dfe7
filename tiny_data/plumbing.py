"""What every program needs and no lesson is about: flags from a dataclass, errors of one line,
files that are written whole or not at all, a picture, a place among the processes of torchrun."""
import argparse
import io
import os
import sys
from dataclasses import field, fields
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's: the programs print it as one line and exit with status 2."""


def fail(message):
    raise UserError(message)


def one_line_errors(main):
    """The program `main`, whose failures are one line on standard error and an exit status."""
    @wraps(main)
    def program(argv=None):
        try:
            return main(argv)
        except (UserError, OSError) as error:
            line, status = f"error: {error}", 2
        except torch.cuda.OutOfMemoryError:
            flags = "--batch_size, --context or --preset"
            line, status = f"error: the GPU's memory is full: lower {flags}", 2
        except KeyboardInterrupt:
            line, status = "stopped: finished phases are saved, --resume goes on from there", 130
        except RuntimeError as error:
            if "state_dict" in str(error):
                line, status = f"error: --out: model.pt does not fit its configuration: {error}", 2
            elif dist.is_initialized():
                line, status = f"error: a process of this torchrun is gone ({error})", 1
            else:
                raise
        print(Path(sys.argv[0]).name + ": " + " ".join(line.split()), file=sys.stderr, flush=True)
        sys.exit(status)
    return program


def flag(default, text, ok=None, group=None):
    """A dataclass field that is a flag; `ok`: the choices, or a tuple (lowest, highest)."""
    return field(default=default, metadata=dict(text=text, ok=ok, group=group))


def flags_of(config, description, argv=None):
    """Command line -> an instance of the dataclass `config`, of fields made by flag().

    A field with a `group` begins a group of --help.  Raises UserError, naming the flag at fault
    and what it accepts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = fail
    for f in fields(config):
        kind, ok, group = type(f.default), f.metadata["ok"], f.metadata["group"]
        page = parser.add_argument_group(group) if group else page
        how = dict(type=kind, choices=ok if isinstance(ok, list) else None)
        how = {bool: dict(action="store_true"), tuple: dict(type=float, nargs="+")}.get(kind, how)
        silent = kind in (str, bool) and not f.default
        text = f.metadata["text"] + ("" if silent else " (default: %(default)s)")
        page.add_argument("--" + f.name, default=f.default, help=text, **how)
    cfg = config(**vars(parser.parse_args(argv)))
    for f in fields(config):
        value, ok = getattr(cfg, f.name), f.metadata["ok"]
        values = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(ok, tuple) and not all(ok[0] <= v <= ok[1] for v in values):
            fail(f"argument --{f.name}: {value}: expected {ok[0]} to {ok[1]}")
    return cfg


def write(content, path):
    """Text or bytes to a file, whole or not at all: a full disk leaves the file that was there."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def save(run, path):
    """A checkpoint, by the one process that writes."""
    if not ranks()[0]:
        content = io.BytesIO()  # of a full disk torch.save itself would make a strange error
        torch.save(run, content)
        write(content.getvalue(), path)


def load(path, device, like=None):
    """What save() wrote; with a fresh run `like`, only what goes on from the same beginning."""
    try:
        run = torch.load(path, map_location=device, weights_only=True)
        saved = {k: run["config"][k] for k in run["config"].keys() - {"out", "resume", "device"}}
        symbols, done = run["symbols"], run["models"]
    except Exception as error:  # whatever a damaged, foreign or hostile file makes of itself
        fail(f"--out {path.parent}: {path.name} is no checkpoint of this program "
             f"({type(error).__name__})")
    if not like and not done:
        fail(f"--out {path.parent}: the run there has finished no phase yet: --resume goes on")
    for k in sorted(saved if like else ()):
        if like["config"].get(k) != saved[k]:
            fail(f"--{k} {like['config'].get(k)}: the run in --out has {saved[k]}")
    if like and like["symbols"] != symbols:
        fail(f"--out {path.parent}: the texts are not those that the run there began with")
    return run


LABELS = {"js": "JS to the truth in bits (0 is best)", "kl": "KL(p‖q) in nats (0 is best)",
          "valid": "share of valid samples (1 is best)", "nll": "held-out NLL in nats a line",
          "judge_acc": "accuracy of a fresh judge (0.5 is best)", "temperature": "temperature T",
          "novel": "share of novel samples"}
BLUE, RED = ["#9ecae1", "#6baed6", "#3182bd", "#08306b"], ["#fdae6b", "#e6550d", "#99000d"]


def draw(arms, panels, likelihood, title, path):
    """The report as a picture, where matplotlib is installed: in each panel, a pair of figures
    (x, y), a curve for each arm over its temperatures, with a standard error on either side.
    The arms named in `likelihood` are dotted and blue, those with a GAN solid and red."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    names = list(dict.fromkeys(a["name"] for a in arms))
    others = [name for name in names if name not in likelihood]
    colours = dict(zip(likelihood, BLUE)) | dict(zip(others, RED))
    for axis, (x, y) in zip(figure.subplots(1, 2), panels):
        for name in names:
            rows = [[a.get(key, 0.0) for key in (x, y, y + "_se", x + "_se")]
                    for a in arms if a["name"] == name]
            axis.errorbar(*zip(*rows), label=name, color=colours[name], marker="o",
                          linestyle="dotted" if name in likelihood else "solid")
        axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper",
                  title="dotted: no GAN")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def peak_memory_mb(device):
    """The most memory that this process has held, on the GPU if it worked there; 0: not known."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def ranks():
    """(number of this process, number of processes) of a torchrun; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors):
    """Replace each by its mean over all processes; there is nothing to do for one alone."""
    for x in tensors if dist.is_initialized() else ():
        dist.all_reduce(x)
        x /= dist.get_world_size()


def agreed(value):
    """What the first process says, in all of them: a decision must not differ."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def join_torchrun(device):
    """Meet the other processes, where torchrun started this one; only the first speaks."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def leave_torchrun():
    """The others have no more to do: what follows, the first process does alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
