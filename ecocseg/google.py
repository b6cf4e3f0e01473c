"""Buckets of Google Cloud Storage without keys: who may use them is decided by the account the machine or pod runs as.

Cloud Storage answers S3's requests at https://storage.googleapis.com, and takes Google's access tokens in place of their
signatures. Tokens come from the metadata server, workload identity or `gcloud auth application-default login`, as google-auth
finds them.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from ecocseg.errors import InputError

HOST = "storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_LOCK = threading.Lock()


def takes_tokens(endpoint: str | None, anonymous: bool) -> bool:
    """Whether an endpoint is Google's and there are no S3 keys (HMAC) to sign with."""
    keys = os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE")
    return endpoint is not None and urlsplit(endpoint).hostname == HOST and not anonymous and not keys


@functools.cache
def _credentials() -> Any:
    try:
        import google.auth
    except ImportError:
        raise InputError(f"{HOST}: without AWS_ACCESS_KEY_ID it takes Google's credentials, which need google-auth; "
                         "pip install google-auth requests") from None
    try:
        return google.auth.default(scopes=[SCOPE])[0]
    except google.auth.exceptions.DefaultCredentialsError:
        raise InputError(f"{HOST}: there are no credentials; give the machine or pod a service account, run `gcloud auth "
                         "application-default login`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to an HMAC "
                         "key") from None


def authorize(request: Any, **_: Any) -> None:
    """Put an access token into a request of boto3's, made anew before it expires. A handler of `before-sign`.

    Raises:
        ConnectionError: when there is none just now; it may pass.
    """
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    credentials = _credentials()
    with _LOCK:
        if not credentials.valid:
            try:
                credentials.refresh(Request())
            except GoogleAuthError as error:
                raise ConnectionError(f"no access token from Google ({type(error).__name__})") from None
    request.headers["Authorization"] = f"Bearer {credentials.token}"
