"""To the Hub: an explicit list of files, and one readable error, with the command that resumes, when it fails."""

import fnmatch
import glob
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tqdm import tqdm
from transformers.utils import logging

from d3etr_hf.errors import HubError
from d3etr_hf.publishing.onnx_precision import FILES
from d3etr_hf.publishing.privacy import absolute_paths_in, anonymise, refuse_secrets
from d3etr_hf.publishing.run_folder import PICTURES, WEIGHTS, WEIGHTS_INDEX
from d3etr_hf.runs.output_folder import CONFIGURATION, read_run_options

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
MODEL_FILES = (WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors", "config.json", "preprocessor_config.json")
CARD_FILES = ("README.md", "metrics.json", "training.yaml", "log_history.json")
# All that may leave a run's folder; whatever else lies there stays.
PUBLISHED_FILES = (*MODEL_FILES, *CARD_FILES, *PICTURES, *FILES.values(), "onnx_check.json")
# All that may be pushed of a checkpoint; no pickle, which runs code where it is loaded.
CHECKPOINT_FILES = (*MODEL_FILES, "query_adapters.safetensors", "trained.safetensors", STATE)

CONNECT_SECONDS, SILENCE_SECONDS = 30.0, 300.0
# what a failed upload raises: from the network, the file system, the client's checks, or an answer without a key
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, KeyError)
BY_STATUS = {
    401: "the Hub does not accept the token, or none was given (401): log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write to this repository (403): use one with write access, or another repo_id",
    404: "there is no such repository, or branch of it, that the token may see (404): check both names",
    409: "another commit to this repository came in between (409): run the command again",
    412: "another commit to this repository came in between (412): run the command again",
    413: "{file} is too large for the Hub (413): save the model in smaller shards",
    429: "the Hub counts too many requests (429): wait {wait} before running the command again",
}
UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
FAILED_FILE = re.compile(r"Error while uploading '(.+)' to the Hub")
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")

# Runs what it is given in the background one by one, so that pushes reach the Hub in the order of their steps.
_QUEUE = HfApi()


def files_to_publish(folder: Path) -> list[Path]:
    """The files of a run's folder that may leave it, sorted.

    Raises:
        HubError: weights, one of their shards, or the configuration are missing.
    """
    names = _names_in(folder, PUBLISHED_FILES)
    missing = {"config.json"} - {*names}
    if WEIGHTS_INDEX in names:
        missing |= {*json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"].values()} - {*names}
    elif WEIGHTS not in names:
        missing.add(WEIGHTS)
    if missing:
        raise HubError(f"{folder} has no {min(missing)}, so nobody could load it: name the folder of a finished run")
    return [folder / name for name in names]


def describe_upload(folder: Path, repo_id: str | None) -> str:
    """What `upload` would do, without a network: every file with its size, the total, and what stays.

    Raises:
        HubError: see `files_to_publish`.
        PrivacyError: a file holds a secret.
    """
    paths = files_to_publish(folder)
    refuse_secrets(paths, places=_places_of_run(folder))
    sizes = [path.stat().st_size for path in paths]
    staying = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path not in paths)
    lines = [f"To {HfApi().endpoint}/{repo_id or '(no repo_id yet)'} would go, from {folder}:"]
    lines += [f"  {path.name:32}  {tqdm.format_sizeof(size, 'B'):>8}" for path, size in zip(paths, sizes, strict=True)]
    lines += [f"{len(paths)} files, {tqdm.format_sizeof(sum(sizes), 'B')}"]
    return "\n".join([*lines, f"Here would stay: {', '.join(staying) or 'nothing'}"])


def upload(
    folder: Path,
    repo_id: str,
    resume_command: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model trained with d3etr_hf",
) -> str:
    """Publish the `PUBLISHED_FILES` of a run's folder. Those that the Hub holds already are not sent again.

    Faults that pass by themselves are sat out by huggingface_hub.

    Args:
        repo_id: `namespace/name`; created if it does not exist.
        resume_command: what the user runs to try again; part of every error message.
        private: whether a new repository is private; None leaves it to the namespace's default.
        token: None takes HF_TOKEN, or that of `hf auth login`.
        revision: an existing branch; None is `main`.

    Returns:
        The commit's URL.

    Raises:
        HubError: files are missing, or the upload did not finish; the message says why and how to resume.
        PrivacyError: a file holds a secret; nothing was sent.
    """
    paths = files_to_publish(folder)
    refuse_secrets(paths, [token], _places_of_run(folder))
    _QUEUE.run_as_future(int).result()  # a push that is still under way must not overwrite the finished model
    api, names = HfApi(token=token), [path.name for path in paths]
    # of an earlier upload: an ONNX file or shards of other weights must not stay beside the new ones
    gone = [pattern for pattern in PUBLISHED_FILES if not fnmatch.filter(names, pattern)]
    try:
        with _limited_patience():
            full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.repo_info(full_id).private:
                raise ValueError("it is public, which no upload changes: make it private in its settings")
            push = {"revision": revision, "commit_message": commit_message, "delete_patterns": gone}
            return _send(api, folder, names, full_id, **push)
    except FAILURES as error:
        reason = _without_token(f"{repo_id} was not uploaded: {explain(error)}", token)
        message = f"{reason}\nEverything is kept in {folder}. To resume the upload, run\n  {resume_command}"
        # the text of a header that cannot be sent holds the token
        holds_token = isinstance(_root_and_file(error)[0], httpx2.LocalProtocolError)
        raise HubError(message) from (None if holds_token else error)


def upload_in_background(
    folder: Path,
    file_patterns: Sequence[str],
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Training in progress",
) -> Future[str | None]:
    """Push files of a folder, such as a checkpoint, to an existing repository while training goes on.

    The files are copied before this returns, since a checkpoint may be removed while it is on its way. A failure is
    logged as one warning, and never raised: the next save pushes again.

    Args:
        file_patterns: names at the top level of `folder`, with wildcards: `CHECKPOINT_FILES` or `PUBLISHED_FILES`.
        path_in_repo: folder of the repository; None is its top.
        repo_id, token, revision: see `upload`.

    Returns:
        Done once the copies are removed again; its result is the commit's URL, or None after a failure.
    """

    def push() -> str | None:
        options = {"path_in_repo": path_in_repo, "revision": revision, "commit_message": commit_message}
        with staging:
            try:
                refuse_secrets([Path(staging.name) / name for name in names], [token])
                with _limited_patience():
                    return _send(HfApi(token=token), Path(staging.name), names, repo_id, **options)
            except Exception as error:  # whatever it is, nobody need ever look at the future
                _warn_of_push(folder, repo_id, explain(error).replace(staging.name, str(folder)), token)

    staging = tempfile.TemporaryDirectory(prefix="d3etr_hf_push_")
    try:
        names = _copy_files(folder, file_patterns, Path(staging.name))
    except OSError as error:
        _warn_of_push(folder, repo_id, str(error), token)
        staging.cleanup()
        return _QUEUE.run_as_future(lambda: None)
    return _QUEUE.run_as_future(push)


def _copy_files(folder: Path, patterns: Sequence[str], target: Path) -> list[str]:
    """Copy the files of these patterns, without paths of this machine; their names.

    Raises:
        OSError: there are none, or one cannot be read.
    """
    names = _names_in(folder, patterns)
    if not names:
        raise FileNotFoundError(f"it holds none of {', '.join(patterns)}")
    for name in names:
        shutil.copyfile(folder / name, target / name)
        if name == STATE:  # it may hold the path of the best checkpoint
            state = anonymise(json.loads((folder / name).read_text()))
            (target / name).write_text(json.dumps(state, indent=2))
    return names


def _warn_of_push(folder: Path, repo_id: str, reason: str, token: str | None) -> None:
    reason = _without_token(reason, token)
    logger.warning(f"{folder} was not pushed to {repo_id}: {reason}. Training goes on; the next save pushes again")


def _places_of_run(folder: Path) -> set[str]:
    """The absolute paths that the run of a folder was given, which are nobody else's business."""
    path = folder / CONFIGURATION
    return absolute_paths_in(read_run_options(path)) if path.exists() else set()


def _names_in(folder: Path, patterns: Sequence[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _send(api: HfApi, folder: Path, names: list[str], repo_id: str, **options) -> str:
    # names, not patterns: the client's wildcards reach into subfolders
    allowed = [glob.escape(name) for name in names]
    return api.upload_folder(folder_path=folder, allow_patterns=allowed, repo_id=repo_id, **options).commit_url


@contextmanager
def _limited_patience() -> Iterator[None]:
    """Make the client give up on a silent Hub, for which it would wait for ever."""
    client = get_session()
    patience, send = client.timeout, client.send

    def send_once(request: httpx2.Request, **options) -> httpx2.Response:
        try:
            return send(request, **options)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            # an error that the client does not know: it would be as patient five more times
            raise TimeoutError(f"the Hub did not answer for {SILENCE_SECONDS:g} seconds") from error

    client.timeout = httpx2.Timeout(SILENCE_SECONDS, connect=min(SILENCE_SECONDS, CONNECT_SECONDS))
    client.send = send_once
    try:
        yield
    finally:
        client.timeout, client.send = patience, send


def explain(error: Exception) -> str:
    """What failed, in plain words and without a token: an exception of huggingface_hub in one line."""
    root, file = _root_and_file(error)
    at_file = f" while uploading {file}" if file else ""
    if (status := _status(root)) is not None:
        wait = f"{seconds:.0f} seconds" if (seconds := _retry_after(root)) else "some minutes"
        text = BY_STATUS.get(status, "the Hub refused the upload ({status})")
        if status >= 500:
            text = "the Hub has a fault ({status}) that is not yours: https://status.huggingface.co tells more"
        text = text.format(status=status, file=file or "a file", wait=wait)
        said = root.server_message if isinstance(root, HfHubHTTPError) and status < 500 else None
        text += f" [the Hub says: {said}]" if said else ""
    elif isinstance(root, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set, which forbids every connection: unset it"
    elif isinstance(root, UNREACHABLE):
        text = f"the Hub cannot be reached ({root}): is the network up, and HF_ENDPOINT right, if it is set?"
    elif isinstance(root, httpx2.LocalProtocolError):
        text = "the request cannot be sent: does the token hold a blank or a line break?"
    elif isinstance(root, httpx2.TransportError | ConnectionError):
        text = f"the connection to the Hub was cut{at_file} ({root})"
    elif isinstance(root, json.JSONDecodeError | KeyError):
        text = "the Hub's answer makes no sense: it has a fault, or HF_ENDPOINT is set to what is no Hub"
    elif isinstance(root, OSError) and root.filename is not None:
        text = f"{root.filename} cannot be read ({root.strerror})"
    else:
        text = f"{root or type(root).__name__}{at_file}"
    return _without_token(" ".join(text.split()))


def _root_and_file(error: Exception) -> tuple[Exception, str | None]:
    """The client wraps what went wrong with a large file into an error that has the file's name."""
    wrapped = FAILED_FILE.search(str(error))
    return (error.__cause__, wrapped[1]) if wrapped and error.__cause__ else (error, None)


def _status(error: Exception) -> int | None:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    return int(found[1]) if (found := XET_STATUS.search(str(error))) else None


def _retry_after(error: Exception) -> float | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else None


def _without_token(text: str, token: str | None = None) -> str:
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}|(?<=\?)X-Amz-[^\s)]+", "***", text)  # the latter signs an address
