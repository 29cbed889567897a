"""A run at Weights & Biases, which must never be what ends a training: without a key, a server or a working library its
numbers stay in the run directory, and that is told of."""

from __future__ import annotations

import base64
import json
import logging
import netrc
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from lejepa_scale.addresses import Address, redacted
from lejepa_scale.config import Config
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)

_ASK_SECONDS = 10.0  # for the server's first answer
_FINISH_SECONDS = 60  # for what is not sent yet, at the end; the library would wait without a limit
_SYNC = "`wandb sync {}/wandb/offline-run-*` sends it later"


def start(config: Config) -> Any:
    """A run of the library's, or None where even an offline one cannot be had. The environment (WANDB_MODE, WANDB_PROJECT,
    WANDB_NAME, WANDB_RUN_ID, WANDB_RESUME, WANDB_DIR) comes before the configuration. Raises UserError where the library is
    absent."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb.enabled=true needs wandb: pip install 'lejepa_scale[wandb]'.") from error
    settings, folder, server = config.log.wandb, config.run.dir, wandb.setup().settings.base_url
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    wanted = {
        "mode": _mode(_key(server, wandb), server, str(folder)),
        "project": settings.project,
        "name": settings.name or folder.name,
        "run_id": identity.read_text(),
        "resume": "allow",
        "dir": str(folder),
    }
    given: dict[str, Any] = {
        name.removeprefix("run_"): x for name, x in wanted.items() if not os.environ.get(f"WANDB_{name.upper()}")
    }
    patience: dict[str, Any] = {} if os.environ.get("WANDB_FINISH_TIMEOUT") else {"finish_timeout": _FINISH_SECONDS}
    try:
        with _command_line_without_secrets():
            return wandb.init(
                **given, config=config.model_dump(mode="json", by_alias=True), settings=wandb.Settings(**patience)
            )
    except Exception as error:  # whatever it is, it is no reason to lose a training
        logger.warning(
            "W&B could not be started (%s). The run goes on without it; its numbers are in metrics.jsonl.",
            redacted(str(error)),
        )
        return None


def _key(server: str, wandb: Any) -> str | None:
    """Of the environment, or of `wandb login`; empty where the library alone knows it, None where nobody does."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    with suppress(OSError, netrc.NetrcParseError):
        if found := netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(server).hostname or ""):
            return found[2]
    return "" if wandb.login(prompt=False, verify=False) else None


def _mode(key: str | None, server: str, folder: str) -> str:
    """Decided beforehand: a process in which an online start has failed can start no offline run (wandb #9865)."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if key is None:
        reason = "there is no key (WANDB_API_KEY, or `wandb login`)"
    elif not (reason := _refusal(server, key)):
        return "online"
    logger.warning("W&B: %s. The run is recorded in its directory; %s.", reason, _SYNC.format(folder))
    return "offline"


def _refusal(server: str, key: str) -> str:
    """Why the server would not take our numbers; empty where it would."""
    about = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{server.rstrip('/')}/graphql",
        json.dumps({"query": "query { viewer { id } }"}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {about}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return f"{server} answers {error.code}" + (": it does not know the key" if error.code in (401, 403) else "")
    except (OSError, ValueError) as error:
        return f"{server} does not answer ({getattr(error, 'reason', None) or error})"
    known = isinstance(found, dict) and (found.get("data") or {}).get("viewer")
    return "" if known or not key else f"{server} does not know the key"


@contextmanager
def _command_line_without_secrets() -> Iterator[None]:
    """W&B keeps it with the run."""
    words = sys.argv
    sys.argv = [str(Address(word)) for word in words]
    try:
        yield
    finally:
        sys.argv = words
