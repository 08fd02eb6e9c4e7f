"""`dgnctl models` and `dgnctl map`."""

from __future__ import annotations

import click

from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, table
from dgnctl.speeds import ms
from dgnd.control.api import Figures, MapView, ModelInfo


@click.command()
@json_option
@socket_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the configured models."""
    with connect_client(ctx) as client:
        found: list[ModelInfo] = client.call("models.list")
    if as_json:
        emit_json(found)
    elif not found:
        emit("no model is configured; add a [models.NAME] table to dgnd's configuration\n")
    else:
        emit("\n".join(describe_model(model) for model in found))


def describe_model(model: ModelInfo) -> str:
    """One model for people, in 80 columns."""
    verified = "verified" if model.verified else "unverified"
    quant = "" if model.quant == "none" else f", quant {model.quant}"
    rows = [
        ("blocks", f"{model.n_blocks}, context {model.context} tokens, {verified}"),
        ("here", f"{model.local or 'nothing'} ({model.backend}, {model.device}, {model.dtype}{quant})"),
        ("template", model.template),
        ("path", model.path),
    ]
    if model.missing:
        rows.insert(2, ("missing", model.missing))
    return f"{model.name}\n" + "".join(f"  {name:<9} {value}\n" for name, value in rows)


@click.command("map")
@json_option
@socket_option
@click.pass_context
def show_map(ctx: click.Context, as_json: bool) -> None:
    """Show which peer serves which blocks."""
    with connect_client(ctx) as client:
        found: MapView = client.call("map.show")
    if as_json:
        emit_json(found)
    else:
        emit(describe_map(found))


def describe_map(found: MapView) -> str:
    """For people, in 80 columns."""
    rows = [
        (r.model, r.name or r.peer, r.span or "-", r.offered or "-", speed(r.figures), r.state)
        for r in found.rows
    ]
    headers = ("MODEL", "PEER", "CONFIGURED", "OFFERED", "MS/TOKEN", "STATE")
    parts = [table(headers, rows)] if rows else ["the map is empty\n"]
    whys = [(r.model, r.name or r.peer, r.why) for r in found.rows if r.why]
    if whys:
        parts.append(table(("MODEL", "PEER", "WHY THESE BLOCKS"), whys))
    if found.missing:
        missing = [(model, span) for model, span in found.missing.items()]
        parts.append(table(("MODEL", "MISSING: NOBODY IN REACH SERVES"), missing))
    return "\n".join(parts)


def speed(figures: list[Figures]) -> str:
    """ms for a token through all that is offered; a dash where some of it was not measured."""
    known = [item.step_ms for item in figures if item.step_ms is not None]
    return ms(sum(known)) if known and len(known) == len(figures) else "-"
