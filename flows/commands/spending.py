"""Before anything is sent: what it takes is shown, what cannot work is refused, and money is asked for."""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from annotation.vlm.preflight import price_of, require_room_in_cap
from data_contracts.errors import ConfigurationError, ExitCode
from flows.chain import Context, StepReport, execute, is_fresh
from flows.commands.common import OUTCOME
from flows.pricing import check_configuration, estimate_judging, price_words
from flows.settings import Settings
from flows.steps import INGEST, STEPS, remember_settings
from flows.steps.concepts import estimate_proposing, will_propose


def show_estimate(context: Context) -> None:
    """What will be sent, model by model; raises `ConfigurationError` where a cap or a key makes it impossible."""
    proposing, priced = estimate_proposing(context), estimate_judging(context)
    if proposing.requests:
        context.console.say(
            f"proposing concepts: {proposing.requests} requests with {proposing.images_sent} images in all, "
            f"price {price_words(proposing, price_of(context.settings.vlm))}"
        )
    for line in (line for work in priced for line in work.lines()):
        context.console.say(line)
    OUTCOME.content["estimate"] = {"proposing": asdict(proposing), "judging": [work.as_dict() for work in priced]}
    require_room_in_cap(context.settings.vlm, proposing.most_usd_per_request)
    check_configuration(context, priced)


def confirmed(context: Context, *, yes: bool) -> list[StepReport]:
    """Ingest, show what will be sent and what it costs, and ask where it may cost money; then remember the settings.

    Where concepts are proposed for money, they are found first, so that the price of judging is one for known concepts.
    Raises what `confirm` raises.
    """
    reports = [execute(INGEST, context)]
    if may_cost_money(context.settings) and will_propose(context):
        confirm(context, yes=yes)
        remember_settings(context)
        reports.append(execute(STEPS["concepts"], context))
    if not all(is_fresh(STEPS[name], context) for name in ("concepts", "judge")):
        confirm(context, yes=yes)
    remember_settings(context)
    return reports


def confirm(context: Context, *, yes: bool) -> None:
    """Show the estimate, and ask before an endpoint on another machine is used.

    Raises:
        ConfigurationError: something cannot work, or there is no terminal to ask and no --yes.
        EndpointError: an endpoint does not answer, or refuses the key.
        typer.Exit: the answer was no.
    """
    show_estimate(context)
    from flows.vlm import require_models

    # Asking for its models costs nothing; nobody should agree to a price of what cannot work.
    require_models(context)
    if may_cost_money(context.settings) and not yes:
        _ask()


def _ask() -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError(
            "The endpoint may cost money and there is no terminal to ask.", remedy="Give --yes to go on."
        )
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(ExitCode.RESUMABLE)


def may_cost_money(settings: Settings) -> bool:
    """Whether images leave this machine."""
    return not all(endpoint.is_loopback for endpoint in settings.vlm.endpoints)
