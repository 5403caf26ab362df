"""The OpenAI-compatible API that generation asks: one question, one answer, whatever happens on the way.

The only importer of `openai`, and late: the server only probes. The client's own retries are off, as they cap
`Retry-After` and repeat what an empty account refuses. Here what may heal is repeated within bounds, a rate limit that
one thread meets holds back all of them, and what cannot heal ends everything at once. Nothing here knows plans.
"""

from __future__ import annotations

import base64
import math
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import httpx2

from knowledge_engine.catalogue import parse_json
from knowledge_engine.core import GenerationProvider
from knowledge_engine.errors import CredentialsError, KnowledgeEngineError, Reason, StateError, UpstreamError
from knowledge_engine.generation.pacing import Closed, Gate, Patience
from knowledge_engine.settings import Settings

if TYPE_CHECKING:
    import openai

MAX_ANSWER_CHARACTERS = 64 * 1024
_MAX_BODY_BYTES = 1024 * 1024
# Of a reply that is no 2xx: the client unpacks it whole.
_MAX_ERROR_BYTES = 16 * 1024
# About ten times the longest conversation that was ever planned; bounds what one runaway reply can cost.
_MAX_COMPLETION_TOKENS = 4096
# A longer wait is no wait: the job ends and says when to come back.
_MAX_WAIT_SECONDS = 600.0
_PROBE_SECONDS = 5.0
_MONEY_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"}
)
_FILTER_CODES = frozenset({"content_filter", "content_policy_violation"})
_RETRIED = frozenset({408, 409, 429})
# Options that not every API takes, and what is sent instead of them once they are refused. A bound on what a reply can
# cost there must be: without one nothing is asked.
_INSTEAD = {"max_completion_tokens": "max_tokens", "seed": None}


class Finish(StrEnum):
    """How a reply ended: with content to read, or why there is none."""

    STOP = "stop"
    REFUSED = "refused"
    CONTENT_FILTERED = "content_filtered"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"


_HALF = re.compile(r"[\ud800-\udfff]")
_FINISHES = {"length": Finish.TRUNCATED, "content_filter": Finish.CONTENT_FILTERED}


class Answer(NamedTuple):
    """One reply; `content` is text where `finish` is STOP. Figures are the reply's own, 0 or None if it told none."""

    finish: Finish
    content: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    num_requests: int = 1


def require_provider(settings: Settings, asked: GenerationProvider | None) -> GenerationProvider:
    """Who will put plans into words: whom the spec names, else OpenAI where there is a key.

    Raises:
        StateError: PROVIDER_NOT_CONFIGURED.
    """
    if asked is None:
        return GenerationProvider.OPENAI if settings.openai_api_key else GenerationProvider.OFFLINE
    if asked is GenerationProvider.OPENAI and settings.openai_api_key is None:
        raise StateError(
            "the provider openai needs a key: set KNOWLEDGE_OPENAI_API_KEY for the service, or take provider offline",
            reason=Reason.PROVIDER_NOT_CONFIGURED,
            provider=asked,
        )
    return asked


def probe(settings: Settings) -> None:
    """One cheap look at the API, a few seconds at most; asks no model and costs nothing.

    Raises:
        CredentialsError: UPSTREAM_CREDENTIALS; UpstreamError: OPENAI_UNAVAILABLE.
    """
    headers = {"authorization": f"Bearer {_key(settings)}"}
    try:
        with (
            httpx2.Client(timeout=_PROBE_SECONDS) as client,
            client.stream("GET", f"{settings.openai_base_url}/models", headers=headers) as response,
        ):
            status = response.status_code
    except httpx2.HTTPError as error:
        raise _unavailable(settings, _described(error)) from None
    if status in {401, 403}:
        raise _credentials(settings, status)
    if status >= 500:
        raise _unavailable(settings, f"answered {status}")
    if 300 <= status < 400:
        raise _unavailable(settings, f"answered {status}, a redirect; give KNOWLEDGE_OPENAI_BASE_URL its real address")


class ChatClient:
    """Asks one model; safe to use from many threads. `close` ends every wait at once."""

    def __init__(self, settings: Settings, patience: Patience = Patience()) -> None:  # noqa: B008 - immutable
        """Raises StateError: PROVIDER_NOT_CONFIGURED; CredentialsError: UPSTREAM_CREDENTIALS."""
        require_provider(settings, GenerationProvider.OPENAI)
        key = _key(settings)
        import openai

        self._settings = settings
        self._patience = patience
        self._gate = Gate(settings.openai_max_concurrency)
        timeout = httpx2.Timeout(settings.openai_timeout_seconds, connect=min(10.0, settings.openai_timeout_seconds))
        self._client = openai.OpenAI(
            api_key=key,
            base_url=settings.openai_base_url,
            max_retries=0,
            timeout=timeout,
            # Redirects are not followed: the key goes to the configured host and to no other.
            http_client=httpx2.Client(
                timeout=timeout,
                follow_redirects=False,
                event_hooks={"response": [self._bound]},
                limits=httpx2.Limits(max_connections=settings.openai_max_concurrency + 1),
            ),
        )
        # Replaced as a whole, since many threads read it.
        self._options: Sequence[str] = tuple(_INSTEAD)
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Sentences for the job's log."""
        self._lock = threading.Lock()
        self.num_requests = 0
        self.num_retries = 0

    @property
    def failure(self) -> KnowledgeEngineError | None:
        """What cannot heal; once there is one, nothing is asked any more."""
        return self._gate.failure

    @property
    def is_closed(self) -> bool:
        return self._gate.is_closed

    def close(self) -> None:
        """Ends every wait; a request under way is abandoned."""
        self._gate.close(None)
        self._client.close()

    def fail(self, error: KnowledgeEngineError) -> KnowledgeEngineError:
        """Ends every wait because of `error`; returns the same."""
        self._gate.close(error)
        return error

    def ask(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], seed: int) -> Answer:
        """The model's reply to `messages`, asked for as JSON of `schema`. Blocks, over failures that may heal.

        Raises:
            Closed: the client was closed meanwhile.
            CredentialsError: UPSTREAM_CREDENTIALS.
            StateError: OPENAI_QUOTA_EXHAUSTED, OPENAI_REQUEST_REFUSED.
            UpstreamError: OPENAI_UNAVAILABLE, OPENAI_RATE_LIMITED.
        """
        started = math.inf
        tries = 0
        while True:
            began = self._gate.enter()
            started = min(started, began)  # to wait for our own gate is no trouble
            self._count(is_retry=tries > 0)
            tries += 1
            try:
                answer = self._request(messages, schema, seed)
            except _Unsupported as option:
                self._gate.leave()
                self._go_without(str(option))
            except _Trouble as trouble:
                silent, is_first = self._gate.count_trouble(began)
                wait = self._wait(trouble, max(tries, silent))
                gives_up = (
                    silent >= (self._patience.first_tries if is_first else self._patience.silent_tries)
                    or tries >= self._patience.tries
                    or wait > _MAX_WAIT_SECONDS
                    or time.monotonic() + wait - max(started, self._gate.last_answer) > self._patience.seconds
                )
                if gives_up:
                    raise self.fail(self._given_up(trouble, max(tries, silent))) from None
                # What is everybody's trouble holds everybody back: one goes and looks whether it is over.
                is_shared = trouble.is_limit or trouble.retry_after is not None or is_first or silent > 2
                self._gate.leave(shut_for=wait if is_shared else None)
                self._gate.pause(wait)
            except KnowledgeEngineError as error:
                raise self.fail(error) from None
            except BaseException:
                self._gate.leave()
                raise
            else:
                self._gate.leave(is_answered=True)
                return answer._replace(num_requests=tries)

    # --- one request ----------------------------------------------------------------------------------------------

    def _request(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], seed: int) -> Answer:
        import openai

        options = {name: seed if name == "seed" else _MAX_COMPLETION_TOKENS for name in self._options}
        wanted = {"name": "conversation", "strict": True, "schema": schema}
        asked: Any = {
            "model": self._settings.openai_model,
            "messages": list(messages),
            "response_format": {"type": "json_schema", "json_schema": wanted},
            **options,
        }
        try:
            with self._client.chat.completions.with_streaming_response.create(**asked) as response:
                body = self._body(response.http_response)
        except openai.APIStatusError as error:
            return self._refused(error, options)
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            if self._gate.is_closed:
                raise Closed from None
            raise _Trouble(_described(error.__cause__ or error)) from None
        return _read(body, self._cost)

    def _bound(self, response: httpx2.Response) -> None:
        """Nobody reads a response for longer than a request may take, nor without end."""
        assert isinstance(response.stream, httpx2.SyncByteStream)
        most = _MAX_BODY_BYTES if response.is_success else _MAX_ERROR_BYTES
        response.stream = _BoundedStream(response.stream, self._settings.openai_timeout_seconds, most)

    def _body(self, response: httpx2.Response) -> bytes | None:
        """The whole body; None when it is too long for any conversation."""
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                return None
        return bytes(body)

    def _refused(self, error: openai.APIStatusError, options: Mapping[str, int]) -> Answer:
        """What a status other than 2xx means: something to repeat, something that ends all, or a filtered prompt."""
        status = error.status_code
        details = error.body if isinstance(error.body, dict) else {"message": error.body}
        codes = {str(details.get(field)) for field in ("code", "type")}
        said = self._cleaned(details.get("message"))
        if codes & _MONEY_CODES or status == 402:
            raise StateError(
                f"{self._where} does nothing more for this key until its account is put right ({said or status}); top "
                "it up or raise its limit, then generate again",
                reason=Reason.OPENAI_QUOTA_EXHAUSTED,
                status=status,
            )
        if status in {401, 403}:
            raise _credentials(self._settings, status, said if status == 403 else "")
        if status in _RETRIED or status >= 500:
            raise _Trouble(f"answered {status}", _retry_after(error.response.headers), is_limit=status == 429)
        if codes & _FILTER_CODES:
            return Answer(Finish.CONTENT_FILTERED)
        advice = _advice(status)
        for option in options:
            if status in {400, 422} and (details.get("param") == option or f"'{option}'" in said):
                if option in _INSTEAD:
                    raise _Unsupported(option)
                advice = f"a model must take a bound on its reply ({option}={_MAX_COMPLETION_TOKENS}): {advice}"
        raise StateError(
            f"{self._where} refused the request ({status}{': ' if said else ''}{said}); {advice}",
            reason=Reason.OPENAI_REQUEST_REFUSED,
            status=status,
            model=self._settings.openai_model,
        )

    def _cost(self, usage: Mapping[str, Any], prompt_tokens: int, completion_tokens: int) -> float | None:
        """US dollars of one reply: by the operator's prices, else as the reply tells; never guessed."""
        per_input, per_output = self._settings.openai_input_price, self._settings.openai_output_price
        if per_input is not None and per_output is not None:
            return (prompt_tokens * per_input + completion_tokens * per_output) / 1e6
        told = usage.get("cost")
        if isinstance(told, bool) or not isinstance(told, int | Decimal) or not 0 <= told < 1e6:
            return None
        return float(told)

    def _go_without(self, option: str) -> None:
        with self._lock:
            if option not in self._options:
                return  # another thread was told the same
            instead = _INSTEAD[option]
            options = [instead if name == option else name for name in self._options]
            self._options = [name for name in options if name is not None]
        going_on = f"with {instead}" if instead else "without"
        self.notes.put(f"{self._settings.openai_model} does not take {option}; going on {going_on}")

    # --- repeating ------------------------------------------------------------------------------------------------

    def _count(self, *, is_retry: bool) -> None:
        with self._lock:
            self.num_requests += 1
            self.num_retries += is_retry

    def _wait(self, trouble: _Trouble, tries: int) -> float:
        """Exponential with full jitter, but never less than what the service asked for."""
        longest = min(self._patience.longest_wait_seconds, self._patience.first_wait_seconds * 2 ** (tries - 1))
        wait = random.uniform(0, longest)  # noqa: S311 - no secret
        if trouble.retry_after is not None:
            # A little more, so that those who were told the same do not all come at once.
            wait = max(wait, trouble.retry_after + random.uniform(0, min(1.0, longest)))  # noqa: S311
        return wait

    def _given_up(self, trouble: _Trouble, tries: int) -> UpstreamError:
        in_vain = f"tries in vain: {tries}"
        if trouble.retry_after is not None:
            in_vain += f", asked to come back in {trouble.retry_after:.0f} s"
        if trouble.is_limit:
            return UpstreamError(
                f"{self._where} limits how often this key may ask ({in_vain}); generate again later, with a smaller "
                "KNOWLEDGE_OPENAI_MAX_CONCURRENCY or a higher limit",
                reason=Reason.OPENAI_RATE_LIMITED,
                retry_after_seconds=trouble.retry_after,
                tries=tries,
            )
        return _unavailable(self._settings, f"{trouble} ({in_vain})", trouble.retry_after)

    @property
    def _where(self) -> str:
        return self._settings.openai_base_url

    def _cleaned(self, text: object) -> str:
        """What an upstream said, short, on one line and without our key in any form."""
        if not isinstance(text, str) or text.lstrip().startswith("<"):  # a page for people
            return ""
        key = _key(self._settings)
        for secret in (key, quote(key, safe=""), base64.b64encode(key.encode()).decode().rstrip("=")):
            text = text.replace(secret, "***")
        text = re.sub(r"\bsk-[\w*-]+", "***", text)
        return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


class _Trouble(Exception):
    """Something that may heal; its text completes the sentence "the service ...". `retry_after` in seconds."""

    def __init__(self, what: str, retry_after: float | None = None, *, is_limit: bool = False) -> None:
        super().__init__(what)
        self.retry_after = retry_after
        self.is_limit = is_limit


class _BoundedStream(httpx2.SyncByteStream):
    """A body that ends after so many bytes, whatever follows, and fails when it takes too many seconds."""

    def __init__(self, stream: httpx2.SyncByteStream, seconds: float, most: int) -> None:
        self._stream = stream
        self._seconds = seconds
        self._most = most

    def __iter__(self) -> Iterator[bytes]:
        deadline = time.monotonic() + self._seconds
        left = self._most + 1  # one more, so that the reader sees that it is too long
        for chunk in self._stream:
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("the whole response takes too long")
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    def close(self) -> None:
        self._stream.close()


class _Unsupported(Exception):
    """The API does not know an option that we can do without."""


# --- reading a reply ----------------------------------------------------------------------------------------------


def _read(body: bytes | None, cost_of: Callable[[Mapping[str, Any], int, int], float | None]) -> Answer:
    """A 2xx body, believed in nothing: what is no completion is MALFORMED, whatever else it is."""
    try:
        reply = parse_json((body or b"").decode())
    except ValueError:
        return Answer(Finish.MALFORMED)
    if not isinstance(reply, dict):
        return Answer(Finish.MALFORMED)
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt_tokens, completion_tokens = _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
    model = reply.get("model")
    told = Answer(
        Finish.MALFORMED,
        model=model if isinstance(model, str) and len(model) <= 200 and model.isprintable() else "",
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=cost_of(usage, prompt_tokens, completion_tokens),
    )
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return told
    finish = _FINISHES.get(str(choice.get("finish_reason")))
    if message.get("refusal"):
        finish = Finish.REFUSED
    if finish is not None:
        return told._replace(finish=finish)
    content = message.get("content")
    if not isinstance(content, str) or not content or len(content) > MAX_ANSWER_CHARACTERS or _HALF.search(content):
        return told
    return told._replace(finish=Finish.STOP, content=content)


def _tokens(usage: Mapping[str, Any], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**31 else 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait for, from `retry-after-ms` or `Retry-After`; None where it asks nothing."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _described(error: BaseException) -> str:
    """A failed connection as the rest of the sentence "the service ..."; never the error's own words."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return "cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return "did not answer in time"
    return "broke the connection off"


def _advice(status: int) -> str:
    if status == 404:
        return "set KNOWLEDGE_OPENAI_MODEL to a model it has, or KNOWLEDGE_OPENAI_BASE_URL to where its API begins"
    if 300 <= status < 400:
        return "it is a redirect; give KNOWLEDGE_OPENAI_BASE_URL its real address"
    return "set KNOWLEDGE_OPENAI_MODEL to a chat model with JSON-schema output (structured outputs)"


def _key(settings: Settings) -> str:
    """Raises CredentialsError: a key that no header can carry."""
    assert settings.openai_api_key is not None
    key = settings.openai_api_key.get_secret_value()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise CredentialsError(
            "KNOWLEDGE_OPENAI_API_KEY is no key: it holds a space or something that is not printable ASCII",
            reason=Reason.UPSTREAM_CREDENTIALS,
            service="openai",
        )
    return key


def _unavailable(settings: Settings, what: str, retry_after: float | None = None) -> UpstreamError:
    return UpstreamError(
        f"{settings.openai_base_url} {what}; see whether it is up and KNOWLEDGE_OPENAI_BASE_URL right, and try again",
        reason=Reason.OPENAI_UNAVAILABLE,
        retry_after_seconds=retry_after,
    )


def _credentials(settings: Settings, status: int, said: str = "") -> CredentialsError:
    if status == 403:
        refusal = f"does not let our key do this (403{': ' if said else ''}{said}); put one that may"
    else:
        refusal = f"refused our key ({status}); put a valid one"
    return CredentialsError(
        f"{settings.openai_base_url} {refusal} into KNOWLEDGE_OPENAI_API_KEY",
        reason=Reason.UPSTREAM_CREDENTIALS,
        service="openai",
        status=status,
    )
