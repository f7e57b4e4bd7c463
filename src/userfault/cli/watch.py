"""`userfault watch`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from userfault.cli._output import DebugOption, JsonOption, command, print_json, table_console
from userfault.errors import UserfaultError

if TYPE_CHECKING:
    from userfault.cli._watch.client import Client

__all__ = ["watch"]

_WINDOW_S = 10.0
# Of a process that is listed or shown once; a watched one has until the next view, and then is "busy".
_PATIENCE_S = 5.0
_LIST_PATIENCE_S = 0.5


@command
def watch(
    pid: Annotated[
        int | None, typer.Argument(help="Process to watch.", show_default="list those that can be", min=1)
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", "-i", help="Seconds between two looks.", min=0.05)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what the memories of a running process do.

    The process opens the socket for it when asked: by USERFAULT_WATCH=1 in its environment, or by calling
    `userfault.observe.serve()`. Only the same user and root may look.

    Rates are those since the last look; latencies (p50 / p99) those of the last ten seconds, and dim, since the memory
    was opened, where nothing happened in that time. Ctrl-C ends it. With --json it prints an object per line, with
    --once a single one; where the output is no terminal, it looks once.
    """
    from userfault.cli._watch.client import Client

    if pid is None:
        _list(as_json=as_json)
        return
    with Client(pid) as client:
        if as_json:
            _print_json(client, interval, once=once)
        elif once or not table_console().is_terminal:
            _print_once(client)
        else:
            _watch(client, interval)


def _list(*, as_json: bool) -> None:
    from userfault.cli._watch.client import BusyError, Client, EndedError, command_of, watchable_pids
    from userfault.reports.watching import processes_table

    processes: list[tuple[int, str, dict[str, Any] | None]] = []
    for pid in watchable_pids():
        try:
            with Client(pid) as client:
                processes.append((pid, command_of(pid), client.ask(_LIST_PATIENCE_S)))
        except BusyError:
            processes.append((pid, command_of(pid), None))
        except EndedError:
            continue
    if as_json:
        found = [
            {"pid": pid, "command": text, "busy": document is None, "memories": _count(document)}
            for pid, text, document in processes
        ]
        print_json({"processes": found})
    elif processes:
        table_console().print(processes_table(processes))
    else:
        print(
            "No process of this user can be watched. One that is started with USERFAULT_WATCH=1, or calls "
            "userfault.observe.serve(), can."
        )


def _count(document: dict[str, Any] | None) -> int | None:
    return None if document is None else len(document["memories"])


def _print_json(client: Client, interval: float, *, once: bool) -> None:
    if once:
        print_json(client.ask(_PATIENCE_S))
        return
    from userfault.cli._watch.client import BusyError, EndedError

    try:
        while True:
            try:
                print(json.dumps(client.ask(interval), ensure_ascii=False), flush=True)
            except BusyError:
                continue
            time.sleep(interval)
    except (EndedError, KeyboardInterrupt):
        return


def _print_once(client: Client) -> None:
    from userfault.cli._watch.client import command_of
    from userfault.reports.watching import watch_view

    console = table_console()
    document = client.ask(_PATIENCE_S)
    console.print(watch_view([document], command=command_of(client.pid), width=console.width))


def _watch(client: Client, interval: float) -> None:
    from rich.live import Live

    from userfault.cli._watch.client import BusyError, EndedError, command_of
    from userfault.reports.watching import watch_view

    console = table_console()
    documents = [client.ask(_PATIENCE_S)]
    heard = time.monotonic()
    name = command_of(client.pid)
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                busy = time.monotonic() - heard
                view = watch_view(
                    documents,
                    command=name,
                    width=console.width,
                    height=console.height,
                    busy_seconds=busy if busy > 2 * interval + 0.5 else 0.0,
                )
                live.update(view, refresh=True)
                due = time.monotonic() + interval
                try:
                    documents.append(client.ask(interval))
                except BusyError:
                    continue
                heard = time.monotonic()
                _forget_old(documents)
                time.sleep(max(0.0, due - time.monotonic()))
    except KeyboardInterrupt:
        return
    except EndedError as ended:
        raise UserfaultError(str(ended)) from ended


def _forget_old(documents: list[dict[str, Any]]) -> None:
    """Keep what latencies are counted from: the newest document that is older than the window, and those after it."""
    newest = documents[-1]["time_ns"]
    while len(documents) > 2 and newest - documents[1]["time_ns"] >= _WINDOW_S * 1e9:
        del documents[0]
