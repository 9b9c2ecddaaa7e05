"""These checks compare what the workers of a model have announced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

from launch.doctor.asking import Patient
from launch.doctor.findings import Finding, fail, ok, warn
from orchestrator.wire.compatibility import (
    ADVICE,
    NO_CONNECTOR_ADVICE,
    Difference,
    differences,
    lacks_connector,
    revision_of,
)

_PAIRS_AT_MOST = 64  # are tried; beyond that each worker is in at least one


def check_fits(model: str, patients: Sequence[Patient]) -> Iterator[Finding]:
    """Check that prefill and decode workers of a model can hand over to each other.

    Revisions and versions have checks of their own: they may differ while an update is under way.
    """
    handing = [patient for patient in patients if patient.address.role != "both" and patient.info is not None]
    lacking = [patient for patient in handing if patient.info is not None and lacks_connector(patient.info)]
    for patient in lacking:
        yield fail("fits", patient.name, "has no KV connector", NO_CONNECTOR_ADVICE)
    misfits = [*_misfits([patient for patient in handing if patient not in lacking])]
    yield from misfits
    yield from _revisions(handing)
    yield from _versions(handing)
    yield from _lengths(patients)
    if len(handing) > 1 and not misfits and not lacking:
        yield ok("fits", model, f"{len(handing)} workers agree: {_agreed(handing)}")


def _agreed(handing: Sequence[Patient]) -> str:
    values = ((field, _value(handing[0], field)) for field in ADVICE if field != "engine_version")
    return ", ".join(f"{field} {value}" for field, value in values if value is not None)


def _misfits(handing: Sequence[Patient]) -> Iterator[Finding]:
    """Return a finding for each field of each worker that differs from what most have."""
    for field in ADVICE:
        usual = _usual(handing, field)
        if usual is None:
            continue
        for patient in handing:
            for difference in _between(patient, usual):
                if difference.field == field:
                    yield _misfit(patient, usual, difference)


def _usual(handing: Sequence[Patient], field: str) -> Patient | None:
    """Return the first worker that has in this field what most have."""
    counts = Counter(_value(patient, field) for patient in handing if _value(patient, field) is not None)
    most = counts.most_common(1)[0][0] if counts else None
    return next((patient for patient in handing if most is not None and _value(patient, field) == most), None)


def _value(patient: Patient, field: str) -> object:
    return getattr(patient.info, field, None)


def _between(one: Patient, other: Patient) -> tuple[Difference, ...]:
    if one.info is None or other.info is None:
        return ()
    return differences(one.info, other.info, within_revision=True)


def _misfit(patient: Patient, usual: Patient, difference: Difference) -> Finding:
    mine, theirs = (f"{value!r:.80}" for value in (difference.mine, difference.theirs))
    found = (
        f"its {difference.field} is {mine}, that of {usual.name} is {theirs}: no KV cache can go between them"
    )
    return fail("fits", patient.name, found, difference.advice)


def can_pair(prefill: Patient, decode: Patient, *, within_revision: bool) -> bool:
    """Return whether a hand-off is worth a try."""
    lacks = any(patient.info is not None and lacks_connector(patient.info) for patient in (prefill, decode))
    is_known = prefill.info is not None and decode.info is not None
    is_apart = within_revision and is_known and revision_of(prefill.info) != revision_of(decode.info)
    return prefill.is_well and decode.is_well and not lacks and not is_apart and not _between(prefill, decode)


def pairs_of(
    patients: Sequence[Patient], *, within_revision: bool
) -> tuple[list[tuple[Patient, Patient]], int]:
    """Return the pairs of a model's workers that are tried, and how many there are in all."""
    prefills = [patient for patient in patients if patient.address.role == "prefill"]
    decodes = [patient for patient in patients if patient.address.role == "decode"]
    pairs = [pair for pair in product(prefills, decodes) if can_pair(*pair, within_revision=within_revision)]
    return _covering(pairs) if len(pairs) > _PAIRS_AT_MOST else pairs, len(pairs)


def _covering(pairs: Sequence[tuple[Patient, Patient]]) -> list[tuple[Patient, Patient]]:
    """Return pairs of which each worker is in at least one."""
    kept: list[tuple[Patient, Patient]] = []
    met: Counter[str] = Counter()
    for prefill, decode in sorted(pairs, key=lambda pair: _spread(pairs, pair)):
        if not met[prefill.name] or not met[decode.name]:
            kept.append((prefill, decode))
            met.update((prefill.name, decode.name))
    return kept


def _spread(pairs: Sequence[tuple[Patient, Patient]], pair: tuple[Patient, Patient]) -> int:
    """Order pairs along the diagonal, so that no worker is in many of the first."""
    prefills = [*dict.fromkeys(prefill.name for prefill, _ in pairs)]
    decodes = [*dict.fromkeys(decode.name for _, decode in pairs)]
    return (decodes.index(pair[1].name) - prefills.index(pair[0].name)) % len(decodes)


# --- what may differ, for a while -------------------------------------------------------------------


def _revisions(handing: Sequence[Patient]) -> Iterator[Finding]:
    advice = "let all load one revision (--revision), or finish the update"
    yield from _differing(handing, "revision", "revision of the model", advice)


def _versions(handing: Sequence[Patient]) -> Iterator[Finding]:
    advice = "install one version, or let pairs be kept within one (routing.pair: same_revision)"
    yield from _differing(handing, "engine_version", "version of the engine", advice)


def _differing(handing: Sequence[Patient], field: str, what: str, advice: str) -> Iterator[Finding]:
    """Find workers without a partner that has the same; where all have one, an update is under way."""
    groups: dict[object, list[Patient]] = {}
    for patient in handing:
        if _value(patient, field) is not None:
            groups.setdefault(_value(patient, field), []).append(patient)
    if len(groups) < 2:
        return
    shown = "; ".join(f"{value!r:.60} at {_names(group)}" for value, group in groups.items())
    check = "revision" if field == "revision" else "version"
    alone = [
        patient for group in groups.values() if len({p.address.role for p in group}) < 2 for patient in group
    ]
    if alone:
        found = f"no partner has its {what}: {shown}"
        yield fail("revision" if check == "revision" else "version", alone[0].name, found, advice)
    else:
        found = f"two or more have a {what} of their own: {shown}"
        yield warn("revision" if check == "revision" else "version", handing[0].address.model, found, advice)


def _names(patients: Sequence[Patient]) -> str:
    names = [patient.name for patient in patients]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _lengths(patients: Sequence[Patient]) -> Iterator[Finding]:
    lengths = {
        patient.name: patient.max_model_len for patient in patients if patient.max_model_len is not None
    }
    if len(set(lengths.values())) > 1:
        least = min(lengths, key=lambda name: lengths[name] or 0)
        found = f"takes {lengths[least]} tokens, others up to {max(lengths.values(), default=0)}"
        yield warn("length", least, found, "give all the same --max-model-len: longer requests can fail")
