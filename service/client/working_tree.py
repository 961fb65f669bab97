"""The files of a working tree that may be learned: what git ignores, what is large or no text, and secrets are left
out."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pathspec import GitIgnoreSpec

from service.client.errors import FileError
from service.client.text_files import text_pieces

# Completions of a session wait for the piece that it learns: about 4,000 tokens.
PIECE_CHARS = 16_000
MAX_BYTES = 262_144
MAX_PATH_CHARS = 400  # a log entry has room for the path and the version of the file
IGNORE_FILE = ".gitignore"
NO_FOLDERS = frozenset({".git", ".hg", ".svn", ".jj"})
LeftOut = Literal["ignored", "secret", "too large", "not a text", "not a file", "path too long", "path not UTF-8"]

# Names of files that hold secrets by custom; a pattern of `.gitignore` cannot bring them back.
SECRET_NAMES = GitIgnoreSpec.from_lines(
    [
        *(".env", ".env.*", "*.env", "!.env.example", "!.env.sample", "!.env.template", ".envrc"),
        *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.asc", "*.gpg"),
        *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass"),
        *(".htpasswd", ".git-credentials", "credentials", "credentials.json", "credentials.y*ml"),
        *("secret.json", "secret.y*ml", "secrets.json", "secrets.y*ml", "secrets.toml", "secrets.ini"),
        *("service-account*.json", "*.tfstate", "*.tfstate.*", "*.tfvars", "kubeconfig", "*.kubeconfig"),
        *(".ssh/", ".gnupg/", ".aws/", ".azure/", ".kube/", ".docker/"),
    ]
)
# Keys and tokens by the forms that their issuers document.
SECRET_TEXT = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # Amazon Web Services
    r"|\bgh[pousr]_[0-9A-Za-z]{36,}|\bgithub_pat_[0-9A-Za-z_]{50,}|\bglpat-[0-9A-Za-z_-]{20,}"  # GitHub, GitLab
    r"|\bxox[abeoprs]-[0-9A-Za-z-]{10,}|\bAIza[0-9A-Za-z_-]{35}|\bhf_[0-9A-Za-z]{30,}"  # Slack, Google, Hugging Face
    r"|\bsk-(?:ant-|proj-|svcacct-)?[0-9A-Za-z_-]{32,}|\b[rs]k_live_[0-9A-Za-z]{16,}"  # OpenAI, Anthropic, Stripe
    r"|\bpypi-[0-9A-Za-z_-]{50,}|\bnpm_[0-9A-Za-z]{36}\b|\bSG\.[\w-]{16,}\.[\w-]{16,}"  # PyPI, npm, SendGrid
)


@dataclass(frozen=True)
class TreeFile:
    """A file that may be learned.

    path: from the root, with slashes. location: where it lies. digest: of its text. characters: length of its text.
    pieces: number of pieces in which it is learned.
    """

    path: str
    location: Path
    digest: str
    characters: int
    pieces: int

    def read(self) -> list[str] | None:
        """Return the pieces of the text; None if the file has changed or gone meanwhile."""
        try:
            text = _read_text(self.location)
        except OSError:
            return None
        return text_pieces(text, PIECE_CHARS) if text is not None and _digest(text) == self.digest else None


@dataclass
class WorkingTree:
    """The folder `root` with its files.

    Attributes:
        max_bytes: size of the largest file that is read.
        left_out: why files were left out, by path; as of the last look at each.
    """

    root: Path
    max_bytes: int = MAX_BYTES
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    _seen: dict[str, tuple[tuple[int, int, int], TreeFile | None]] = field(default_factory=dict)

    def files(self) -> Iterator[TreeFile]:
        """Yield the files that may be learned, folder by folder in the order of their names.

        A file that was read before, and has the same size and time since, is not read again.

        Raises:
            FileError: there is no such folder, or a `.gitignore` in it can't be read.
        """
        if not self.root.is_dir():
            raise FileError(f"{self.root} is no folder")
        self.left_out.clear()
        seen, self._seen = self._seen, {}
        for path in self._paths(self.root, ()):
            name = path.relative_to(self.root).as_posix()
            try:
                status = path.lstat()
            except OSError:
                continue  # it has just gone
            stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
            file = seen[name][1] if name in seen and seen[name][0] == stamp else self._read(path, name)
            if isinstance(file, TreeFile):
                self._seen[name] = (stamp, file)
                yield file
            elif file is not None:
                self.left_out[name] = file

    def _paths(self, folder: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> Iterator[Path]:
        """Yield the files below a folder that neither git nor their names leave out."""
        ignore = folder / IGNORE_FILE
        if ignore.is_file():
            try:
                rules = (*rules, (folder, _read_rules(ignore)))
            except OSError as error:  # what it names must not be learned
                raise FileError(f"{ignore} can't be read: {error.strerror or error}") from error
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
            name = path.relative_to(self.root).as_posix()
            if is_folder and entry.name in NO_FOLDERS:
                continue
            if not _is_utf8(name):
                self.left_out[name] = "path not UTF-8"
            elif SECRET_NAMES.match_file(f"{name}/" if is_folder else name):
                self.left_out[name] = "secret"
            elif _is_ignored(path, is_folder, rules):
                self.left_out[name] = "ignored"
            elif is_folder:
                yield from self._paths(path, rules)
            elif entry.is_file(follow_symlinks=False):
                yield path
            else:
                self.left_out[name] = "not a file"

    def _read(self, path: Path, name: str) -> TreeFile | LeftOut | None:
        """Return a file, or why it is left out; None for one that is empty or gone."""
        if len(name) > MAX_PATH_CHARS:
            return "path too long"
        try:
            if path.stat().st_size > self.max_bytes:
                return "too large"
            text = _read_text(path)
        except OSError:
            return None
        if text is None:
            return "not a text"
        if SECRET_TEXT.search(text):
            return "secret"
        pieces = len(text_pieces(text, PIECE_CHARS))
        return TreeFile(name, path, _digest(text), len(text), pieces) if text.strip() else None


def _read_text(path: Path) -> str | None:
    """Return the text of a file; None for a file that is no UTF-8 text. Raises OSError."""
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _read_rules(path: Path) -> GitIgnoreSpec:
    """Return the patterns of a `.gitignore`, without those that are none to git either, such as a lone `!`."""
    patterns = list[Any]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, re.error):
            patterns += GitIgnoreSpec.from_lines([line]).patterns
    return GitIgnoreSpec(patterns)


def _is_utf8(name: str) -> bool:
    """Return whether a name can be sent: Python has lone surrogates for bytes of a name that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _is_ignored(path: Path, is_folder: bool, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> bool:
    """Return what the last pattern says that fits a path: the rules of inner folders come last."""
    for folder, spec in reversed(rules):
        name = path.relative_to(folder).as_posix()
        found = spec.check_file(f"{name}/" if is_folder else name).include
        if found is not None:
            return found
    return False
