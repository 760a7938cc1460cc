"""The app of a site: Flower starts a process for each message, which asks a process that stays, and imports next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.flower.resident import App, asked

if TYPE_CHECKING:
    from fedtune.flower.setups import Setup

_IDLE = 300.0  # seconds
_MADE: list[tuple[Setup | None, Path]] = []  # what the apps of this process are set up with


def client_app(setup: Setup | None = None) -> ClientApp:
    """The app of every site of a federation.

    Args:
        setup: makes module, data and loop of the app's configuration and, on a site, of the site's (`flwr run --run-config`,
            `flower-supernode --node-config`), where "place" is "site". Data of one client are the site's own; else they are
            those of all clients, of which the site is one. By default from the file `config.yaml` beside the caller's.
    """
    caller = sys._getframe(1).f_globals  # an app's files lie side by side
    folder = Path(caller.get("__file__", ".")).resolve().parent
    _MADE.append((setup, folder))
    app, home = ClientApp(), App(folder, str(caller["__name__"]))

    @app.query()
    def about(message: Message, context: Context) -> Message:
        return _answer("query", home, message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer("train", home, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer("evaluate", home, message, context)

    return app


def made() -> Setup:
    """The set-up of the app of this process."""
    from fedtune.flower.setups import from_file

    setup, folder = _MADE[-1]
    return setup or from_file(folder)


def _answer(kind: str, home: App, message: Message, context: Context) -> Message:
    run: Mapping[str, Any] = dict(context.run_config)
    node = dict(context.node_config)
    idle = node.pop("idle", _IDLE)
    if type(idle) in (int, float) and idle > 0:
        content = asked(home, context.node_id, float(idle), {"kind": kind, "run": run, "node": node}, message.content)
    else:
        from fedtune.flower.answers import Answers

        answers = Answers(made(), run, node)
        content = answers.answer(kind, message.content)
        answers.close()
    return Message(content, reply_to=message)
