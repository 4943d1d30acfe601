"""The `fqgan` command.

    fqgan run CONFIG [key.sub=value ...] [--dry-run] [--json]
    fqgan shards|teachers|train|codes|sample|evaluate|report CONFIG [key.sub=value ...]
    fqgan checkpoints list|verify|export|prune CONFIG tokenizer|autoregressive [key=value ...]
    fqgan weights fetch CONFIG to=DIR [key.sub=value ...] [--json]
    fqgan doctor [CONFIG] [key.sub=value ...] [--json]

Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 verification found damage, 75 what was
waited for in vain may come yet (storage, capacity, lost nodes): the same command goes on. SIGTERM
ends a command as Ctrl-C does, with 143. A training finishes its step and saves first, for up to
`termination.grace_s`; a second signal ends it at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from fqgan_dist.command_line import DAMAGE_FOUND, DONE, carry_out
from fqgan_dist.config import Config, load_config, parse_config
from fqgan_dist.errors import FAILED, ConfigError
from fqgan_dist.stages.catalog import STAGES
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.uri import parse_path
from fqgan_dist.terminal import clean_text, write, write_json
from fqgan_dist.training.config import CheckpointTarget
from fqgan_dist.weights.config import FetchTarget

logger = logging.getLogger(__name__)


# What takes a second or more to import is imported where a command is carried out, so that help and
# the answer to a wrong setting come at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    # argparse takes settings before or after a flag, but not both: flags go last.
    options = _build_parser().parse_args(sorted(given, key=lambda text: text.startswith("--")))
    return carry_out(lambda: int(options.command_fn(options)))


class _Parser(argparse.ArgumentParser):
    """An argparse parser; what it says of wrong arguments repeats no credential."""

    def error(self, message: str) -> NoReturn:
        super().error(str(clean_text(message)))


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fqgan", description="Train FQGAN tokenizers and FAR generators.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run_help = "run all stages, or those of stages=[...]; done ones are skipped"
    for name, help_text in [
        ("run", run_help),
        *{each.command: each.help for each in STAGES}.items(),
    ]:
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        _add_config_arguments(command)
        command.set_defaults(command_fn=_run, command=name)
    _add_checkpoint_commands(commands)
    _add_weights_commands(commands)
    _add_doctor_command(commands)
    return parser


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    command.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings to change")
    command.add_argument("--dry-run", action="store_true", help="say what would be done")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    checkpoints = commands.add_parser("checkpoints", help="look after a run's checkpoints")
    actions = checkpoints.add_subparsers(required=True, metavar="ACTION")
    for name, help_text in (
        ("list", "list the committed checkpoints"),
        (
            "verify",
            "check every byte [step=N], or what was trained on (ledger=true); exit 3 on damage",
        ),
        ("export", "write weights to one file: to=FILE [format=ours|published] [step=N]"),
        ("prune", "delete what the retention settings do not keep"),
    ):
        action = actions.add_parser(name, help=help_text, allow_abbrev=False)
        action.add_argument("config", metavar="CONFIG")
        action.add_argument("stage", choices=("tokenizer", "autoregressive"))
        action.add_argument("overrides", metavar="key=value", nargs="*")
        action.add_argument("--json", action="store_true", help="print the result as JSON")
        action.set_defaults(command_fn=_checkpoints, action=name)


def _add_weights_commands(commands: argparse._SubParsersAction) -> None:
    weights = commands.add_parser("weights", help="get the weights of pretrained networks")
    actions = weights.add_subparsers(required=True, metavar="ACTION")
    fetch = actions.add_parser(
        "fetch",
        help="download the config's hub weights into a directory: to=DIR",
        allow_abbrev=False,
    )
    fetch.add_argument("config", metavar="CONFIG")
    fetch.add_argument("overrides", metavar="key.sub=value", nargs="*")
    fetch.add_argument("--json", action="store_true", help="print the result as JSON")
    fetch.set_defaults(command_fn=_fetch_weights)


def _add_doctor_command(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, or every node of the cluster of RAY_ADDRESS",
        allow_abbrev=False,
    )
    doctor.add_argument(
        "config", metavar="CONFIG", nargs="?", help="also check its storage, weights and resources"
    )
    doctor.add_argument("overrides", metavar="key.sub=value", nargs="*")
    doctor.add_argument("--json", action="store_true", help="print the result as JSON")
    doctor.set_defaults(command_fn=_diagnose)


def _run(options: argparse.Namespace) -> int:
    config = _load(options.config, options.overrides)
    if options.command != "run":
        if any(text.startswith("stages=") for text in options.overrides):
            raise ConfigError(
                f"stages: has no effect on `fqgan {options.command}`, which runs its own; "
                f"use `fqgan run`"
            )
        stages = tuple(each.name for each in STAGES if each.command == options.command)
        config = config.model_copy(update={"stages": stages})
    if options.dry_run:
        from fqgan_dist.stages.plan import plan_run
        from fqgan_dist.stages.plan_rendering import render_plan

        plan = plan_run(config)
        write_json(plan) if options.json else write(render_plan(plan))
        return DONE
    from fqgan_dist.orchestration.driver import run_pipeline

    summary = run_pipeline(config)
    if options.json:
        write_json(summary)
    return DONE


def _checkpoints(options: argparse.Namespace) -> int:
    values, config_overrides = _split_options(options.overrides, CheckpointTarget)
    config = _load(options.config, config_overrides)
    target = parse_config(values, CheckpointTarget, source="command line")
    from fqgan_dist.stages.checkpoints import run_checkpoint_action

    result = run_checkpoint_action(options.action, config, options.stage, target)
    write_json(result.report) if options.json else write(result.text)
    return DAMAGE_FOUND if result.is_damaged else DONE


def _fetch_weights(options: argparse.Namespace) -> int:
    values, config_overrides = _split_options(options.overrides, FetchTarget)
    config = _load(options.config, config_overrides)
    target = parse_config(values, FetchTarget, source="command line")
    from fqgan_dist.stages.weights_fetch import fetch_weights

    result = fetch_weights(config, target)
    write_json(result.report) if options.json else write(result.text)
    result.check()
    return DONE


def _diagnose(options: argparse.Namespace) -> int:
    config = None
    if options.config is not None:
        config = _load(options.config, options.overrides)
    from fqgan_dist.orchestration.doctor import run_doctor

    diagnosis = run_doctor(config)
    write_json(diagnosis.report) if options.json else write(diagnosis.text)
    return FAILED if diagnosis.has_failed else DONE


def _load(path: str, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(parse_path(path), overrides, RunConfig)
    except ValueError as error:
        raise ConfigError(f"CONFIG: {error}") from error


def _split_options(texts: Sequence[str], target: type[Config]) -> tuple[dict[str, str], list[str]]:
    """Part a command's own options, the fields of its target, from the settings of the run."""
    names = target.model_fields
    parted = [(text.partition("="), text) for text in texts]
    own = {name: value for (name, _, value), _ in parted if name in names}
    return own, [text for (name, _, _), text in parted if name not in names]


if __name__ == "__main__":
    sys.exit(main())
