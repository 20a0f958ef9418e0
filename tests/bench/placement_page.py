"""``docs/placement.md``, written from rows of figures: every number of the page comes from the run that wrote it.

Rules: what is explained stands here as text, what was measured is a table; a goal that is missed says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.sim.baselines import ABLATIONS, BASELINES
from tests.bench.placement_cases import ALIKE, OURS, UNLIKE, Case, Row
from tests.bench.placement_goals import ENERGY_GOAL, GOODPUT_GOAL, SHARES, Contest, Spread
from tests.bench.placement_static import STATIC

ORACLES = ("greedy-latency",)
SIMPLE = tuple(name for name in BASELINES if name not in ORACLES)
AGAINST = (
    "load ratio, 99 %", "load ratio, 90 %", "goodput beyond", "goodput beside", "J saved, dynamic", "J saved, with idle",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """What one placer made of the windows: gaps to the optimum, each the share of the optimum's requests that it lacks."""

    name: str
    gaps: tuple[float, ...]
    energy_ratios: tuple[float, ...]
    """Of its energy over the optimum's, in the windows where it served as many."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a run of the benchmark found."""

    command: str
    machine: Mapping[str, object]
    trace_source: str
    seconds: float
    rows: Mapping[Case, Row]
    windows: tuple[WindowFigures, ...] = ()
    windows_proven: int = 0
    window_requests: int = 0
    decision_us: tuple[float, float] | None = None
    """Median and 99th percentile of one ``choose`` over eight boards."""
    front: tuple[tuple[int, Row], ...] = ()
    """By ``energy_us_per_mj``."""
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Title of each picture by the name of its file, in order."""

    def contest(self, fleet: str, workload: str) -> Contest:
        return Contest.of({case: row for case, row in self.rows.items() if is_swept(case)}, fleet, workload)

    @property
    def workloads(self) -> list[str]:
        return sorted({case.workload for case in self.rows if case.fleet == UNLIKE and is_swept(case)})


def is_swept(case: Case) -> bool:
    return not case.lost and case.energy_us_per_mj is None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(found: Findings, folder: str) -> str:
    parts = [
        _head(found), _goals(found), WHY, _sustained(found), _closely(found), _ablations(found), _lost(found),
        _alike(found), _orchestrated(found), _windows(found), _front(found), _pictures(found, folder), _limits(),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Findings) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in found.machine.items())
    cost = f" One decision over eight boards takes {found.decision_us[0]:.0f} µs (median; 99th percentile \
{found.decision_us[1]:.0f} µs) on this machine." if found.decision_us else ""  # fmt: skip
    return f"""# Placement, measured

This page is written by `{found.command}`; change the benchmark, not the page. It simulates fleets of agents (the production node
code on a virtual clock) on emulated boards: **a simulated plant**, time, energy and heat are modelled, no board was measured.
Requests: {found.trace_source}. {len(found.rows)} runs in {found.seconds:.0f} s on: {facts}.{cost}

## Words

* **Within its limits**: answered, by its deadline, by a model over its quality floor, under its energy ceiling if it has one.
* **Goodput**: such requests a second. **Attainment**: their share of all requests, over the whole run (*raw*) or of those that
  came after the warm-up (*steady*).
* A placer **sustains** a load when its steady attainment is at least 99 % (or 90 %, as DistServe defines goodput, arXiv
  2401.09670) there and at every lower load of the sweep; attainment is taken to be straight between two loads. It **begins to
  miss deadlines** at the highest load that it sustains at 99 %.
* **J a request**: energy of all boards above idling (*dynamic*), or all of it (*with idle*), for each request within its limits,
  lost work included. Emulated.
* Requests of the workloads `azure`, `mooncake` and `mixed` are due 2 s after they came and 30 ms more a token that the answer may
  have (half of them: somebody waits), 10 s and 60 ms (three in ten: somebody reads along) or 60 s and 200 ms (two in ten: work
  for later); a third asks for the better model and is given 4 s and 60 ms, 15 s and 100 ms, or 60 s and 200 ms. In `azure-alike`
  all are of the first kind. Lengths are the trace's, prompts halved (mooncake: a twentieth), answers a quarter.
* Figures are means over seeds, with the least and the most in brackets.

All placers choose among the same options behind the same hard filters, and all move KV alike; only the pick differs. A
baseline picks a board and takes on it the fastest model over the request's quality floor, the variant strongest in goodput.
`jsq2` probes its two boards' true queues at no cost of time. `greedy-latency` is an oracle: it knows every true queue at every
moment, KV reuse is in its prediction, and no board could do that. *FIFO* is a plain queue that sheds nothing before its
deadline has passed, how such systems are usually built; without that word boards run the earliest deadline first and shed what
is hopeless, as ours do."""


def _rivals(contest: Contest, names: Iterable[str], *, plain: bool) -> list[str]:
    return contest.swept(f"{name}, FIFO" if plain else name for name in names)


def _goals(found: Findings) -> str:
    lines = []
    for workload in found.workloads:
        contest = found.contest(UNLIKE, workload)
        for title, names, plain in (
            ("simple, FIFO", SIMPLE, True), ("simple, our queue", SIMPLE, False),
            ("oracle, FIFO", ORACLES, True), ("oracle, our queue", ORACLES, False),
        ):  # fmt: skip
            if rivals := _rivals(contest, names, plain=plain):
                lines.append([workload, title, *_against(contest, contest.best(rivals, SHARES[0]))])
    head = ["trace", "against the best", "which is", *AGAINST]
    return f"""## The goals

At least {GOODPUT_GOAL}x the goodput of the best simple baseline where that one begins to miss deadlines, and at least
{ENERGY_GOAL:.0%} fewer joules a request at equal goodput. At the load where a baseline begins to miss, it still serves 99 %,
so nothing can serve 1.3x as much *there*; the goal is read in these ways:

* **load ratio**: the load that ours sustains over the load that the baseline sustains;
* **goodput beyond**: our goodput at {GOODPUT_GOAL}x the load where the baseline begins to miss, over the baseline's goodput at
  that load of its own ({GOODPUT_GOAL} would be everything);
* **goodput beside**: our goodput over the baseline's, both at {GOODPUT_GOAL}x that load.

Joules are compared at the load where the first of the two begins to miss, so goodput is equal to within 1 %. A dash: that
baseline misses deadlines at every load of the sweep.

{table(head, lines)}"""


def _against(contest: Contest, rival: str) -> list[str]:
    high, low = SHARES
    figures = (
        (contest.load_ratio(OURS, rival, high), GOODPUT_GOAL),
        (contest.load_ratio(OURS, rival, low), GOODPUT_GOAL),
        (contest.goodput_beyond(OURS, rival, high), None),
        (contest.goodput_beside(OURS, rival, high), None),
    )
    saved = [contest.energy_saved(OURS, rival, high, with_idle=idle) for idle in (False, True)]
    return [
        rival.removesuffix(", FIFO"), *(_verdict(figure, goal) for figure, goal in figures),
        _verdict(saved[0], ENERGY_GOAL, percent=True), _verdict(saved[1], None, percent=True),
    ]  # fmt: skip


def _verdict(figure: Spread | None, goal: float | None, *, percent: bool = False) -> str:
    if figure is None:
        return "–"
    text = f"{100 * figure.mean:.0f} % ({100 * figure.low:.0f} to {100 * figure.high:.0f})" if percent else figure.text()
    if goal is None:
        return text
    return f"**{text}**" if figure.mean >= goal else f"{text}, *missed*"


def _sustained(found: Findings) -> str:
    head, columns = ["placer"], []
    for workload in found.workloads:
        head += [f"{workload}, {share:.0%}" for share in SHARES]
        columns.append(found.contest(UNLIKE, workload))
    names = ordered(name for contest in columns for name in contest.swept(contest.sweeps))
    lines = [[name, *(_load(contest, name, share) for contest in columns for share in SHARES)] for name in names]
    return f"""## Sustained load, in requests a second

`≥`: sustained at every load of the sweep. 0: missed even at its lowest, as where some boards are too slow for some requests.

{table(head, lines)}"""


def _load(contest: Contest, name: str, share: float) -> str:
    if not contest.swept([name]):
        return ""
    sweeps = contest.sweeps[name].values()
    return ("≥ " if any(sweep.holds_to_the_end(share) for sweep in sweeps) else "") + contest.sustained(name, share).text()


def _closely(found: Findings) -> str:
    """Every figure of every placer at one load of each sweep."""
    parts = []
    for workload in found.workloads:
        contest = found.contest(UNLIKE, workload)
        load = telling_load(contest)
        rows = {name: [row for sweep in seeds.values() for row in sweep.rows if row.case.load_permille == load]
                for name, seeds in contest.sweeps.items()}  # fmt: skip
        names = ordered(name for name, of_load in rows.items() if of_load)
        parts.append(f"### {workload}, {_mean(rows[OURS], 'offered_per_s'):.2f} requests a second\n\n{closely(names, rows)}")
    said = "The first load of the sweep at which the best simple baseline with a FIFO queue is under 99 %."
    return "\n\n".join(["## Closely, at one load", said, *parts])


def closely(names: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> str:
    head = ["placer", "goodput, 1/s", "attainment raw", "steady", "shed", "p50, s", "p95, s", "p99, s", "J a request, dynamic",
            "with idle", "migrations"]  # fmt: skip
    lines = [
        [
            name, Spread.of(row.goodput_per_s for row in rows[name]).text(),
            *(f"{100 * _mean(rows[name], each):.1f} %" for each in ("attainment", "attainment_steady", "shed_rate")),
            *(f"{_mean(rows[name], each) / 1000:.2f}" for each in ("p50_ms", "p95_ms", "p99_ms", "mj", "mj_all")),
            f"{_mean(rows[name], 'migrations'):.0f}",
        ]
        for name in names
    ]  # fmt: skip
    return table(head, lines)


def telling_load(contest: Contest) -> int:
    rivals = _rivals(contest, SIMPLE, plain=True) or _rivals(contest, SIMPLE, plain=False) or [OURS]
    best = contest.best(rivals, SHARES[0])
    rows = [row for sweep in contest.sweeps[best].values() for row in sweep.rows]
    loads = sorted(
        {row.case.load_permille for row in contest.sweeps[OURS][contest.seeds[0]].rows} & {row.case.load_permille for row in rows}
    )
    missed = [load for load in loads if _mean([r for r in rows if r.case.load_permille == load], "attainment_steady") < SHARES[0]]
    return missed[0] if missed else loads[-1]


def _ablations(found: Findings) -> str:
    lines = []
    for workload in found.workloads:
        contest = found.contest(UNLIKE, workload)
        for name in (*ABLATIONS, f"{OURS}, FIFO"):
            for load, part, whole in _pairs(contest, name):
                shares = (f"{100 * _mean(each, 'attainment_steady'):.1f} %" for each in (part, whole))
                kept = Spread.of(mine.goodput_per_s / all_.goodput_per_s for mine, all_ in zip(part, whole, strict=True))
                cost = Spread.of(mine.mj / all_.mj for mine, all_ in zip(part, whole, strict=True))
                lines.append([name, workload, load, *shares, kept.text(), cost.text()])
    if not lines:
        return ""
    head = ["ours", "trace", "offered, 1/s", "attainment without", "with", "goodput without / with", "joules without / with"]
    return f"""## What each part gives

Ours with a part taken away: no board is booked (`without-table`), where a session's past lies is not counted
(`without-affinity`), the state of the other boards is dealt out among them anew (`shuffled-state`), the first decision for a
class is kept for ever (`frozen`), the queue is FIFO and sheds nothing early (`table, FIFO`: without admission). A part is worth
its place where goodput without it is under 1 or joules are over 1.

{table(head, lines)}"""


def _pairs(contest: Contest, name: str) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """For each load of both, the rows of ``name`` and of ours, seed by seed; where nothing was served there is nothing to say."""
    loads: dict[int, list[tuple[Row, Row]]] = {}
    for seed, sweep in contest.sweeps.get(name, {}).items():
        ours = {row.case.load_permille: row for row in contest.sweeps[OURS][seed].rows}
        for row in sweep.rows:
            loads.setdefault(row.case.load_permille, []).append((row, ours[row.case.load_permille]))
    for _, pairs in sorted(loads.items()):
        if all(whole.goodput_per_s and whole.mj for _, whole in pairs):
            yield f"{_mean([whole for _, whole in pairs], 'offered_per_s'):.2f}", [p for p, _ in pairs], [w for _, w in pairs]


def _lost(found: Findings) -> str:
    rows: dict[str, list[Row]] = {}
    for case, row in found.rows.items():
        if case.lost:
            rows.setdefault(case.name, []).append(row)
    if not rows:
        return ""
    lost = next(case.lost for case in found.rows if case.lost)
    lines = [[name, *(_spread(rows[name], each) for each in ("goodput_per_s", "goodput_late_per_s"))] for name in ordered(rows)]
    return f"""## A board is lost

`{lost}` dies half-way and stays away; what comes in there itself is lost for everybody. The frozen plan goes on with it.

{table(["placer", "goodput, 1/s", "after the loss"], lines)}"""


def _alike(found: Findings) -> str:
    workloads = sorted({case.workload for case in found.rows if case.fleet == ALIKE})
    lines = []
    for workload in workloads:
        contest = found.contest(ALIKE, workload)
        for plain in (True, False):
            if rivals := _rivals(contest, SIMPLE, plain=plain):
                lines.append([workload, "FIFO" if plain else "ours", *_against(contest, contest.best(rivals, SHARES[0]))])
    if not lines:
        return ""
    head = ["trace", "their queue", "the best simple baseline", *AGAINST]
    return f"""## The null case: eight boards alike

Where all boards are alike and each can do everything, there is little to choose.

{table(head, lines)}"""


def _orchestrated(found: Findings) -> str:
    lines = []
    for fleet in (UNLIKE, ALIKE):
        for workload in sorted({case.workload for case in found.rows if case.placer in STATIC}):
            swept = [row for row in found.rows.values() if (row.case.fleet, row.case.workload) == (fleet, workload)]
            swept = [row for row in swept if is_swept(row.case) and not row.case.plain_queue]
            for load in sorted({row.case.load_permille for row in swept if row.case.placer in STATIC}):
                lines.append([fleet, workload, *_gain([row for row in swept if row.case.load_permille == load])])
    if not lines:
        return ""
    head = ["fleet", "trace", "offered, 1/s", "best static plans", "OG, goodput", "OG, joules"]
    return f"""## Orchestrated, or only set up well

OG is what observing gains over the best static plan found in hindsight, which knows every request of the run beforehand but keeps
each stream (ingress board, task, quality floor) at one (board, model): our goodput over its goodput, and its dynamic joules a
request over ours. Plans tried: {", ".join(STATIC)}, and the frozen first decisions; the one with the most goodput stands for them
in each seed. Eight boards alike under a light load are the null case: there OG should be about 1.

{table(head, lines)}"""


def _gain(rows: Sequence[Row]) -> list[str]:
    """Of one fleet, workload and load."""
    goodput, joules, names = [], [], set()
    for seed in sorted({row.case.seed for row in rows}):
        of_seed = {row.case.placer: row for row in rows if row.case.seed == seed}
        best = max((row for name, row in of_seed.items() if name in (*STATIC, "frozen")), key=lambda row: row.goodput_per_s)
        names.add(best.case.placer)
        if best.goodput_per_s and of_seed[OURS].mj:
            goodput.append(of_seed[OURS].goodput_per_s / best.goodput_per_s)
            joules.append(best.mj / of_seed[OURS].mj)
    ratios = [Spread.of(each).text() if each else "–" for each in (goodput, joules)]
    return [f"{_mean(rows, 'offered_per_s'):.2f}", ", ".join(sorted(names)), *ratios]


def _windows(found: Findings) -> str:
    if not found.windows:
        return ""
    count = len(found.windows[0].gaps)
    lines = [
        [each.name, *(f"{100 * figure:.1f} %" for figure in (_quantile(each.gaps, 500), _quantile(each.gaps, 950))),
         f"{100 * sum(not gap for gap in each.gaps) / len(each.gaps):.0f} %", _ratio(each.energy_ratios)]
        for each in found.windows
    ]  # fmt: skip
    head = ["placer", "median gap", "95th percentile", "windows without a gap", "energy over the optimum's"]
    return f"""## Against the exact optimum

{count} windows of {found.window_requests} requests of talk over the eight boards, empty at its beginning,
{found.windows_proven} of them solved to proof by CP-SAT. The optimum serves the most requests within their deadlines, then
with the least energy; it is clairvoyant: it knows every arrival of the window, which no placer can. In a window a board is one
machine that runs one request at a time for its modelled busy time (no shared decode steps, no heat, no gossip delay, no past
of sessions), the same for all. The gap is the share of the optimum's requests that a placer lacks; energy is compared where it
served as many.

{table(head, lines)}"""


def _ratio(ratios: Sequence[float]) -> str:
    return Spread.of(ratios).text() if ratios else "–"


def _quantile(figures: Sequence[float], permille: int) -> float:
    return sorted(figures)[max(0, -(-len(figures) * permille // 1000) - 1)]


def _front(found: Findings) -> str:
    if not found.front:
        return ""
    lines = [
        [f"{worth}", f"{row.mean_s:.2f}", f"{row.mj / 1000:.2f}", f"{row.mj_all / 1000:.2f}", f"{100 * row.attainment:.1f} %",
         "yes" if not _dominated(row, [other for _, other in found.front]) else "no"]
        for worth, row in found.front
    ]  # fmt: skip
    head = ["energy_us_per_mj", "mean latency, s", "J a request, dynamic", "with idle", "attainment", "on the front"]
    return f"""## Latency against energy

Ours, one run for each worth of a millijoule (`[policy] energy_us_per_mj`), at {found.front[0][1].offered_per_s:.2f} requests a
second ({found.front[0][1].case.workload}). Read as an epsilon-constraint: for a bound on energy, take the fastest row under it.

{table(head, lines)}"""


def _dominated(row: Row, others: Iterable[Row]) -> bool:
    return any(o.mean_s <= row.mean_s and o.mj <= row.mj and (o.mean_s, o.mj) != (row.mean_s, row.mj) for o in others)


def _pictures(found: Findings, folder: str) -> str:
    if not found.pictures:
        return ""
    return "## Pictures\n\n" + "\n\n".join(f"{title}\n\n![{title}]({folder}/{name})" for name, title in found.pictures.items())


WHY = """## Where the goals are not reached, and why

* **The sweep ends.** Where ours holds 99 % at the last load of the sweep (`≥` below), its load ratio is a lower bound.
* **Urgency is what there is to win.** Where requests are due at unlike times (`azure`, `mixed`), running the earliest
  deadline first, telling the wait by urgency and giving up early carry more load than a plain queue. Where all are alike
  (`azure-alike`) there is nothing to reorder, and 1.0 is what is left.
* **The best simple baseline is given our knowledge.** Stale-greedy and greedy-latency predict with the same learned costs,
  the same views, the same KV plan and the same memory of what was sent. The placers that look at queues alone sustain 99 %
  at no load, or at a fifth of ours.
* **Three fast boards are the fleet.** The better model runs on them alone; near saturation their capacity binds everybody.
  Hand-made splits (one board for the small model, others for the large) sustained no more.
* **The two goals pull apart.** A millijoule that is worth more keeps turns on the efficient board, a dearer congestion
  spreads them. With worth 1000 and factor 30 energy fell by 22 to 29 % at 1.17 times the load; the default (700 and 50) is
  between.
* **Tried:** 16 pairs of those weights; congestion that grows with the square of bookings (worse in both); costs of a job
  alone instead of elapsed times (kept: ADR 11); not placing what every board would be late for (kept: ADR 9)."""
"""Of the figures in docs/placement.md; to be looked at again when they change."""


def _limits() -> str:
    return """## What this does not show

* Nothing here was measured on a board: profiles are published or assumed figures (docs/boards.md), and the same model is
  behind what boards predict and what then happens, so that predictions are better than on metal.
* The traces were recorded on data-centre fleets; lengths and rates are scaled to eight small boards.
* Baselines are ours to write: they pass the same filters and use the same KV moves, which most such systems do not have."""


def ordered(names: Iterable[str]) -> list[str]:
    """Ours, the baselines with a FIFO queue, those with ours, the ablations."""
    known = [OURS, *(f"{name}, FIFO" for name in BASELINES), *BASELINES, f"{OURS}, FIFO", *ABLATIONS]
    there = set(names)
    return [name for name in known if name in there] + sorted(there - set(known))


def _spread(rows: Sequence[Row], figure: str) -> str:
    return Spread.of(getattr(row, figure) for row in rows).text()


def _mean(rows: Sequence[Row], figure: str) -> float:
    return Spread.of(getattr(row, figure) for row in rows).mean
