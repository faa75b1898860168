"""The sections of a report that say what clients learned of the model: from the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shlex import quote

from fedveil.report.console.audit_table import by_outcome
from fedveil.report.curves import (
    MOST_ATTACKS,
    Line,
    attack_name,
    best,
    coalition_lines,
    round_lines,
)
from fedveil.report.page.charts import Chart, draw
from fedveil.report.page.heatmap import heat_map, most_shown
from fedveil.report.page.markup import Html, Node, listing, table, tag
from fedveil.report.reading import RunFolder
from fedveil.report.words import DASH, human_measure, human_percent, human_seconds
from fedveil.run import Attacked, Checked, UpdateGuess
from fedveil.run.findings import ALARM, NOT_APPLICABLE, SOUND, Outcome
from fedveil.tasks.metrics import Metric

__all__ = [
    "attacks", "audit_command", "checks", "exposure", "kept_and_shown", "not_protected",
    "raised_alarms",
]  # fmt: skip

_MANY = 25
"""Of more attacks than this only the strongest of each kind is shown at once."""

_NAMED = 3
"""So many clients of a coalition are named; the others are counted."""


def audit_command(run: RunFolder) -> Html:
    """How to audit this run, where it lies now."""
    return tag("p", "To audit it: ", tag("code", f"fedveil audit {quote(str(run.folder))}"))


def raised_alarms(run: RunFolder) -> Html | None:
    """A red box with everything that should never have been found; None if there is nothing."""
    raised = run.audit.answering(ALARM) if run.audit else []
    if not raised:
        return None
    title = "Alarm: a check of the messages failed"
    items = listing([[tag("b", one.check), ": ", one.found] for one in raised])
    return tag("section", tag("h2", title), items, class_="alarms", aria_label=title)


def kept_and_shown(run: RunFolder) -> Node:
    """The models beside the attackers, over rounds and over coalitions."""
    over_rounds, over_coalitions = round_lines(run), coalition_lines(run)
    metric, pictures = run.metric, []
    form = {"%": "percent", "nats per token": "nats"}.get(metric.unit, "")
    better, rises = ("below", "falls") if metric.lower_is_better else ("above", "rises")
    if over_rounds:
        attacked = any(line.look == "attack" for line in over_rounds)
        others = " and every attacker (hollow marks)" if attacked else ""
        reading = (
            f"How to read it: the further the owner's model (blue) lies {better} every proxy "
            f"(orange){others}, the less was given away."
        )
        if attacked:
            reading += (
                " An attacker stands at the number of rounds in which the client was sent "
                f"something; the {MOST_ATTACKS} strongest kinds are drawn."
            )
        chart = Chart("rounds", "Over rounds", "rounds", metric.axis, form)
        pictures.append(draw(chart, over_rounds, reading))
    if over_coalitions:
        reading = (
            f"How to read it: the further an attacker's line {rises} to the right, the more "
            "clients gain by putting together what they were sent."
        )
        x = "clients who pool their bytes"
        chart = Chart("coalitions", "Over coalitions", x, metric.axis, form)
        pictures.append(draw(chart, over_coalitions, reading))
    if not pictures:
        return tag("p", "Nothing was measured: the run has no test set.")
    return tag("div", pictures, class_="figures")


def exposure(run: RunFolder) -> Node:
    """How much of the model each client was shown after each round, and each coalition."""
    shown = run.exposure
    if not shown:
        why = "there is no exposure ledger"
        if run.audit is not None:
            why = "messages show more than the units that they list (see the checks)"
        return tag("p", f"It is not known what clients were shown: {why}.")
    parts: list[Node] = [tag("p", most_shown(shown))]
    if run.audit is None:
        note = "How it came about round by round is known once the run has been audited."
        parts.append(tag("p", note))
    reading = (
        "How to read it: each row is a client, from the first round on the left; the darker, the "
        "more of the model's numbers the client had been sent by then, at any number of bits. What "
        "was not sent may still be guessed: the attacks measure that."
    )
    rounds = run.rounds if run.audit else 0
    picture = tag("h3", "Client by client"), heat_map(shown, rounds), tag("figcaption", reading)
    parts.append(tag("figure", picture, class_="wide"))
    if run.audit and run.audit.coalitions:
        points = tuple((size, 100 * held) for size, held in sorted(run.audit.coalitions.items()))
        line = Line("the coalition that holds most", "coalition", points)
        chart = Chart(
            "held", "What coalitions hold together", "clients who pool their bytes",
            "% of the model's numbers", "percent", from_zero=True,
        )  # fmt: skip
        reading = "How to read it: where the line is flat, another client adds nothing new."
        parts.append(tag("div", draw(chart, [line], reading), class_="figures"))
    return parts


def attacks(run: RunFolder) -> Node:
    """Every attack with what it used and what it got, the strongest first."""
    if run.audit is None:
        return [tag("p", "No attack was tried on this run."), audit_command(run)]
    if not run.audit.attacks:
        return tag("p", "The audit tried no attack.")
    metric = run.metric
    ranked = _ranked(run.audit.attacks, metric)
    first = {(attack_name(attack), attack.released): attack for attack in reversed(ranked)}
    leading = [attack for attack in ranked if attack in first.values()]
    effort = "everything was tried" if run.audit.full else "the quick set of attacks was tried"
    said = f"strongest first; {effort}, in {human_seconds(run.audit.seconds)}"
    if len(ranked) <= _MANY:
        tables: Node = _attack_table(f"All attacks, {said}", ranked, metric)
    else:
        everything = _attack_table("All attacks, strongest first", ranked, metric)
        tables = [
            _attack_table(f"The strongest attack of each kind, {said}", leading, metric),
            tag("details", tag("summary", f"All {len(ranked)} attacks"), everything),
        ]
    reading = (
        "How to read it: a leak of 0 % is no better than what the attacker reaches without a "
        "released byte, 100 % is as good as the owner's model. Gain shown: how much of what the "
        "rounds added to the base the attacker has. Errors: distance of the stolen from the global "
        "model's weights, as a share of the latter's size."
    )
    return [tables, tag("p", reading, class_="aid"), _inferred(run.audit.inferred)]


def _inferred(guesses: Sequence[UpdateGuess]) -> Node:
    """What a client tells of the others from two proxies in a row."""
    if not guesses:
        return []
    caption = f"What {guesses[0].client} infers of the mean of the others' updates"
    header = ("Round", "Cosine with the truth", "Share of the weights")
    rows = [(str(guess.round), f"{guess.cosine:.2f}", _percent(guess.share)) for guess in guesses]
    reading = (
        "How to read it: the difference of the proxies before and after a round, less the client's "
        "own part. A cosine of 1 is certainty, 0 is chance."
    )
    return [table(caption, header, rows, numeric=(0, 1, 2)), tag("p", reading, class_="aid")]


def checks(run: RunFolder) -> Node:
    """What the messages were checked for: alarms, what was not checked, what is sound."""
    if run.audit is None:
        return [tag("p", "The messages of this run have not been checked."), audit_command(run)]
    if not run.audit.checks:
        return tag("p", "The audit made no checks: nothing is known of the messages.")
    rows = [(one.check, _outcome(one), one.found) for one in by_outcome(run.audit.checks)]
    reading = (
        "How to read it: an alarm means that a message holds what no client should ever get. Sound "
        "means that it was looked for, and is not in what was looked at. Not applicable means that "
        "it was not looked for, as there was nothing to look at, or as nothing says what should be "
        "there: that speaks neither for the scheme nor against it."
    )
    header = ("Check", "Outcome", "What was found, or why nothing was looked for")
    return [
        table("Checks of the messages, alarms first", header, rows),
        tag("p", reading, class_="aid"),
    ]


def not_protected(run: RunFolder) -> Node:
    """What no figure of the page speaks for."""
    if run.audit is None:
        return [
            tag("p", "An audit lists what its figures do not speak for. In every run:"),
            listing(_NEVER_PROTECTED),
        ]
    return listing(run.audit.not_protected or _NEVER_PROTECTED)


_NEVER_PROTECTED = (
    "What was released once cannot be taken back.",
    "The server sees each client's update, which tells much about that client's data.",
    "If the owner started from a public model, the initial values of withheld units are public.",
)


def _ranked(attacks: Sequence[Attacked], metric: Metric) -> list[Attacked]:
    rest, ranked = list(attacks), []
    while (strongest := best(rest, metric)) is not None:
        ranked.append(strongest)
        rest.remove(strongest)
    return ranked + rest


def _attack_table(caption: str, attacks: Sequence[Attacked], metric: Metric) -> Html:
    header = (
        "Attack", metric.name.capitalize(), "Leak", "Gain shown", "Whose bytes", "Rounds",
        "In place of what was withheld", "Afterwards", "Error, released", "Error, withheld", "Note",
    )  # fmt: skip
    rows = [
        (
            attack.attack,
            human_measure(metric.of(attack.measures), metric),
            _percent(attack.leak),
            _percent(attack.gain_shown),
            _clients(attack),
            str(attack.rounds),
            attack.holes or DASH,
            attack.polish or DASH,
            _percent(attack.error_released),
            _percent(attack.error_withheld),
            attack.note,
        )
        for attack in attacks
    ]
    return table(caption, header, rows, numeric=(1, 2, 3, 5, 8, 9), class_="attacks")


def _percent(share: float | None) -> str:
    return human_percent(None if share is None else 100 * share, sign=True)


def _clients(attack: Attacked) -> Node:
    if not attack.released:
        return "no released bytes"
    names = attack.clients
    if len(names) <= _NAMED + 1:
        return _names(names)
    return [
        f"{len(names)} clients: ",
        _names(names[:_NAMED]),
        f" and {len(names) - _NAMED} more",
    ]


def _names(names: Sequence[str]) -> Node:
    """Each name in one piece, if there is room."""
    last = len(names) - 1
    return [
        [tag("span", name, class_="name"), ", " if place < last else ""]
        for place, name in enumerate(names)
    ]


_WORDS: Mapping[Outcome, tuple[str, str]] = {
    ALARM: ("ALARM", "raised"),
    NOT_APPLICABLE: (NOT_APPLICABLE, "unmade"),
    SOUND: (SOUND, "sound"),
}


def _outcome(one: Checked) -> Html:
    word, look = _WORDS[one.outcome]
    return tag("span", word, class_=look)
