"""`gptlab page`: runs, comparisons and the lens in a browser, behind a link that only this start knows."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

from gptlab.cli.arguments import Parser
from gptlab.cli.console import StopRequest, printable
from gptlab.errors import UsageError

if TYPE_CHECKING:
    from gptlab.cli.model import Opened
    from gptlab.page.guard import AccessPolicy


def main(argv: list[str]) -> int:
    """Print the link and serve it until Ctrl-C, which is 0; raises UsageError, and ConfigError for a port in use."""
    options = _parse(argv)
    from gptlab.page.app import READ, WRITE, create_app, listen, serve
    from gptlab.page.guard import AccessPolicy

    with listen(options.host, options.port) as listening:
        policy = AccessPolicy(
            options.host, listening.getsockname()[1], secrets.token_urlsafe(), frozenset({READ, WRITE})
        )
        app, queues = create_app(Path(options.folder), options.model, partial(_open, options=options), policy)
        with StopRequest() as asked_to_stop:
            _announce(policy, options)
            serve(app, listening, asked_to_stop)
            if queues.busy:  # Python would wait for a model to be opened that nobody will look into
                os._exit(0)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab page",
        description="Show runs, their curves while they run, comparisons and the lens in a browser. The link that is "
        "printed holds a new token each time; nothing is written, and nothing is fetched from elsewhere. From another "
        "machine: ssh -L PORT:127.0.0.1:PORT MACHINE, then open the link here.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", default="log", help="where runs lie, at any depth [log]")
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen [127.0.0.1: this machine alone]")
    add("--port", metavar="N", type=int, default=0, help="where to listen; 0 takes any that is free [0]")
    add("--model", metavar="SOURCE", help="a model for the lens: a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--device", metavar="NAME", default="auto", help="of the lens: auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the lens's matmuls [fp32]")
    add("--threads", metavar="N", type=int, default=0, help="of the lens [all cores]")
    add("--json", action="store_true", help='print {"url"} instead of words')
    options = parser.parse(argv)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port: expected a number from 0 to 65535, found {options.port}")
    for name, what in (("folder", "a folder of runs"), ("model", "a run, a checkpoint or a Hugging Face folder")):
        given = getattr(options, name)
        if given is not None and not Path(given).is_dir():
            raise UsageError(f"expected {what}, found none at {given}; check the path")
    return options


def _open(source: str, options: argparse.Namespace) -> Opened:
    from gptlab.cli.model import open_model

    return open_model(source, options.device, options.dtype, options.threads)


def _announce(policy: AccessPolicy, options: argparse.Namespace) -> None:
    """The link on standard output, and on standard error what it gives away."""
    name = policy.host if policy.local else gethostname()
    shown = f"[{name}]" if ":" in name else name
    url = f"http://{shown}:{policy.port}/{policy.token}/"
    print(json.dumps({"url": url}) if options.json else url, flush=True)
    said = [f"the runs in {options.folder}, until Ctrl-C"]
    if not policy.local:
        said.append(
            f"warning: {policy.host} is open to other machines: whoever has or overhears the link can read these runs "
            f"and their samples, and ask the lens; safer is ssh -L {policy.port}:127.0.0.1:{policy.port}"
        )
    for line in said:
        print(printable(line), file=sys.stderr, flush=True)
