"""The client of an S3 server, and what its exceptions mean; the only module that knows s3fs.

s3fs holds the session and the event loop, on top of aiobotocore. The endpoint comes from
`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, credentials from the places where AWS tools look; their
packages are imported at the first connection, as local storage needs none of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import urlsplit

from fqgan_dist.credentials import holds_credentials
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.endpoint import find_endpoint
from fqgan_dist.storage.s3_errors import RequestError

_CONNECT_TIMEOUT_S = 10
# Longest silence of a server within an answer.
_READ_TIMEOUT_S = 60


def connect(*, max_connections: int) -> Any:
    """Make an s3fs file system that repeats and caches nothing by itself.

    Raises:
        ConfigError: the endpoint that the environment names is no address of a server.
    """
    import s3fs
    from aiobotocore.session import AioSession

    session = AioSession()
    # The description of S3's interface takes most of the time of a first connection (0.1 s).
    session.register_component("data_loader", _description_loader())
    filesystem = s3fs.S3FileSystem(
        endpoint_url=_check_endpoint(),
        session=session,
        use_listings_cache=False,  # other processes write here too
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "max_pool_connections": max_connections,
        },
    )
    filesystem.retries = 1  # RequestRetries alone repeats
    return filesystem


@cache
def _description_loader() -> Any:
    from aiobotocore.session import AioSession

    return AioSession().get_component("data_loader")


def _check_endpoint() -> str | None:
    found = find_endpoint()
    if found is None:
        return None
    variable, endpoint = found
    try:
        url = urlsplit(endpoint)
        is_address = url.scheme in ("http", "https") and bool(url.hostname)
        is_address = is_address and url.port != 0  # a port that is no number raises
    except ValueError:
        is_address = False
    if not is_address or holds_credentials(endpoint):
        # The value is not repeated: it may hold a secret.
        raise ConfigError(
            f"{variable}: is no plain address of a server; expected http(s)://host:port "
            "without credentials; correct it, or unset it for AWS itself"
        )
    return endpoint


def client_errors() -> tuple[type[Exception], ...]:
    """Name what a request may raise."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, ClientError, BotoCoreError, ResponseParserError)


def as_request_error(error: Exception) -> RequestError:
    """Sort an exception of one of the layers below; never by its text, which may hold secrets."""
    from botocore import exceptions as boto

    answer = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(answer, boto.ClientError):
        return RequestError.of_answer(answer.response)
    name = type(error).__name__
    match error:
        case RequestError():
            return error
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            return RequestError("credentials", str(error))
        case (
            boto.CredentialRetrievalError()
            | boto.NoAuthTokenError()
            | boto.TokenRetrievalError()
            | boto.ProfileNotFound()
        ):
            return RequestError("credentials", name)
        case boto.ConnectionError():
            return RequestError("unreachable", name)
        case boto.ParamValidationError():
            return RequestError("other", str(error))
        case boto.HTTPClientError() | boto.IncompleteReadError() | ConnectionError():
            return RequestError("broken", name)
        case boto.BotoCoreError():
            return RequestError("other", name)
        case _:
            return RequestError("broken", name)
