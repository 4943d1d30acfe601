"""Command line of `benchmarks/faults.py`: calm run, storm, comparison, simulation, table."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.fault_campaign.grounds import CONFIG, Campaign, Failure, open_campaign
from benchmarks.fault_campaign.injection import NOTHING, inject
from benchmarks.fault_campaign.measures import (
    STAGES,
    Goodput,
    Recovered,
    compare,
    find_goodput,
    find_recoveries,
    find_training,
    read_sessions,
)
from benchmarks.fault_campaign.settings import Settings, parse_settings
from benchmarks.fault_campaign.simulator import Row, hourly_rate, simulate_all
from benchmarks.fault_campaign.storm import FAULTS, plan_storm
from benchmarks.options import describe_options
from benchmarks.reporting import describe_machine, write_results
from fqgan_dist.errors import ConfigError

EQUAL, DIFFERENT, WRONG_USAGE = 0, 1, 2
CALM, STORM = "s3://bucket/calm", "s3://bucket/storm"
NODES = (8, 64)
INTERVALS_S = (60.0, 300.0, 600.0, 1800.0, 3600.0)
RATES = (
    ("5 % a month", hourly_rate(0.05)),
    ("20 % a month", hourly_rate(0.20)),
    ("10 % an hour", 0.1),
)
"""The first two are edges of what the AWS Spot Instance Advisor publishes for its types (classes
from below 5 % to above 20 % of nodes in a month); the third is no published one: a bad hour."""


@dataclass(frozen=True, kw_only=True)
class Happened:
    """A fault of the storm."""

    at_s: float
    """Since its begin."""
    stage: str
    """The training that was under way; "": none."""
    name: str
    lasted_s: float
    what: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found."""

    calm: Goodput
    storm: Goodput
    faults: list[Happened]
    recoveries: list[Recovered]
    equal: dict[str, bool]
    num_commands: int
    codes: list[int]
    num_by_hand: int
    simulated: list[Row]
    recovery_s: float
    """What the simulation took for a recovery without the wait for another node."""


def main(arguments: Sequence[str]) -> int:
    """Run a campaign, print what came of it, and keep it if asked to; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(describe_options(Settings, source="benchmarks/faults.py"))
        return EQUAL
    try:
        settings = parse_settings([text for text in arguments if text != "--json"])
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return WRONG_USAGE
    command = shlex.join(["python", "benchmarks/faults.py", *arguments])
    try:
        report = run_campaign(settings)
    except Failure as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return DIFFERENT
    machine = describe_machine(("torch", "ray", "s3fs"))
    content = {"command": command, "machine": machine, "settings": settings.model_dump(mode="json")}
    text = json.dumps(content | asdict(report), indent=2)
    table = to_table(report, settings, machine, command)
    print(text if "--json" in arguments else table)
    if settings.results is not None:
        write_results(settings.results, "faults", table=table, report=text)
    is_good = all(report.equal.values()) and report.num_by_hand == 0
    return EQUAL if is_good else DIFFERENT


def run_campaign(settings: Settings) -> Report:
    """Run in calm, then in the storm, compare, and simulate."""
    settings.log.write_bytes(b"")
    steps = {"tokenizer": settings.tokenizer_steps, "autoregressive": settings.autoregressive_steps}
    with open_campaign(settings) as campaign:
        calm_s, _ = _run(campaign, CALM, storm_s=0)
        calm = find_goodput(read_sessions(CALM), steps, wall_s=calm_s)
        _say(f"calm: {calm_s:.0f} s")
        log_length = settings.log.stat().st_size
        storm_s, faults = _run(campaign, STORM, storm_s=60 * settings.minutes)
        storm = find_goodput(read_sessions(STORM), steps, wall_s=storm_s)
        log = settings.log.read_bytes()[log_length:].decode(errors="replace")
        recoveries = find_recoveries(log)
        equal = compare(STORM, CALM, str(CONFIG))
    whole = [each.whole_s - each.parts.get("capacity", 0) for each in recoveries]
    recovery_s = statistics.median(whole) if whole else 0.0
    simulated = simulate_all(
        RATES,
        NODES,
        INTERVALS_S,
        recovery_s=recovery_s + settings.replacement_s,
        save_s=settings.save_s,
        noticed=settings.noticed,
        seed=settings.seed,
    )
    return Report(
        calm=calm,
        storm=storm,
        faults=faults,
        recoveries=recoveries,
        equal=equal,
        num_commands=campaign.num_commands,
        codes=campaign.codes,
        num_by_hand=campaign.num_by_hand,
        simulated=list(simulated),
        recovery_s=recovery_s,
    )


def _run(campaign: Campaign, root: str, *, storm_s: float) -> tuple[float, list[Happened]]:
    """Run to the end, through a storm of so many seconds; gives the seconds, and what happened."""
    settings = campaign.settings
    began = time.monotonic()
    campaign.begin(root)
    faults: list[Happened] = []
    for fault in plan_storm(
        settings.seed,
        mean_pause_s=settings.mean_pause_s,
        longest_s=settings.longest_s,
        names=settings.faults,
    ):
        if time.monotonic() - began + fault.pause_s >= storm_s:
            break
        if campaign.wait(fault.pause_s):
            break
        stage = find_training(root)
        at = time.monotonic()
        what = inject(campaign, fault)
        lasted_s = time.monotonic() - at
        happened = Happened(
            at_s=at - began, stage=stage, name=fault.name, lasted_s=lasted_s, what=what
        )
        faults.append(happened)
        _say(f"{happened.at_s:5.0f} s  {stage:14}  {fault.name}: {what}; {lasted_s:.0f} s")
    while not campaign.wait(3600):
        pass
    return time.monotonic() - began, faults


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def to_table(report: Report, settings: Settings, machine: dict[str, str], command: str) -> str:
    """Write the report for a reader."""
    lines = [command, "; ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += _describe_runs(report)
    lines += ["", "faults", "  at       lasted  stage           what"]
    lines += [
        f"  {each.at_s:5.0f} s  {each.lasted_s:4.0f} s  {each.stage:14}  {each.name}: {each.what}"
        for each in report.faults
    ]
    lines += ["", "faults that met something, by stage", *_count_faults(report.faults)]
    lines += ["", "recoveries", *_describe_recoveries(report.recoveries)]
    lines += ["", "equal to the calm run, to the bit"]
    lines += [f"  {name}: {'yes' if is_so else 'NO'}" for name, is_so in report.equal.items()]
    lines += ["", *_describe_simulation(report, settings)]
    return "\n".join(lines)


def _describe_runs(report: Report) -> list[str]:
    lines = ["run    wall     useful   goodput  steps done again  step"]
    for name, run in (("calm", report.calm), ("storm", report.storm)):
        steps = ", ".join(f"{stage} {each:.3f} s" for stage, each in run.step_s.items())
        lines.append(
            f"{name:5}  {run.wall_s:5.0f} s  {run.useful_s:5.0f} s  {run.fraction:7.1%}"
            f"  {run.num_repeated:16}  {steps}"
        )
    lines.append(
        f"storm: {report.num_commands} commands, exit codes before the last "
        f"{report.codes}, by hand {report.num_by_hand}"
    )
    return lines


def _count_faults(faults: Sequence[Happened]) -> list[str]:
    met = Counter((each.name, each.stage) for each in faults if NOTHING not in each.what)
    lines = [f"  {'':16}" + "".join(f"{stage or 'no training':>16}" for stage in (*STAGES, ""))]
    for name in FAULTS:
        counts = "".join(f"{met[name, stage]:16}" for stage in (*STAGES, ""))
        lines.append(f"  {name:16}{counts}")
    return lines


def _describe_recoveries(recoveries: Sequence[Recovered]) -> list[str]:
    names = list(dict.fromkeys(name for each in recoveries for name in each.parts))
    lines = ["  " + "  ".join(["stage          step", "  whole", *(f"{n:>11}" for n in names)])]
    for each in recoveries:
        parts = [f"{each.parts[n]:11.1f}" if n in each.parts else " " * 11 for n in names]
        lines.append("  " + "  ".join([f"{each.stage:14}{each.step:5}{each.whole_s:7.1f}", *parts]))
    return lines


def _describe_simulation(report: Report, settings: Settings) -> list[str]:
    lines = [
        f"simulated goodput of spot nodes: a recovery takes {report.recovery_s:.1f} s (the median "
        f"above, without capacity) and {settings.replacement_s:g} s for another node, a save "
        f"{settings.save_s:g} s, noticed {settings.noticed:.0%}; in brackets Daly's expectation, "
        "without notice",
        "  "
        + "  ".join(["losses per node  nodes", *(f"{each:>11g} s" for each in INTERVALS_S)])
        + "    best: Young    Daly",
    ]
    rows: dict[tuple[str, int], list[Row]] = {}
    for row in report.simulated:
        rows.setdefault((row.rate, row.num_nodes), []).append(row)
    for (rate, nodes), found in rows.items():
        cells = [f"{each.simulated:5.1%} ({each.expected:5.1%})" for each in found]
        best = f"{found[0].young_s:11.0f} s {found[0].daly_s:7.0f} s"
        lines.append(f"  {rate:15}  {nodes:5}  " + "  ".join(f"{c:>13}" for c in cells) + best)
    return lines
