"""Who may give us code: ed25519 keys, one of this user's own to sign with, and those that this user trusts.

An entry that leaves this machine is its manifest, and in the next line a signature of exactly these bytes. The manifest
names the key of the entry, the SHA-256 of the payload and its size; so a signature fits one entry and one payload, and
is worth nothing beside another. It is checked before a byte of the manifest or of the payload is interpreted.

    <folder>/signing.pem   this user's secret key (PKCS 8, not encrypted: the folder is private, as the store's is)
    <folder>/trusted       the keys whose entries are loaded, one a line: 64 hexadecimal digits and a name

Who holds a trusted key can run any code as this user. Needs `cryptography`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fluxfire.store.files import Folder, StoreError, open_private
from fluxfire.store.manifest import KEY, MANIFEST_LIMIT, Manifest, canonical

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAME: Final = re.compile(r"[\w.@+-][\w.@+ -]{0,99}")
SIGNED_LIMIT: Final = MANIFEST_LIMIT + 1024
_PURPOSE: Final = b"fluxfire megacache entry, format 1\n"  # so that a signature made for anything else is none here
_SIGNATURE: Final = re.compile(rb'\{"key":"([0-9a-f]{64})","signature":"([0-9a-f]{128})"\}\n')
_SECRET, _TRUSTED, _LIMIT = "signing.pem", "trusted", 2**20


class Keys:
    """The keys in one private folder.

    Args:
        path: the folder; None: fluxfire's among this user's settings.

    Raises:
        StoreError, OSError: the folder is not private, or cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        _ed25519()
        self._folder: Folder = open_private(path or default_folder())
        self.path = self._folder.path

    def make(self, name: str) -> str:
        """Makes this user's own key, and trusts it; the public half.

        Raises:
            StoreError: there is one already.
        """
        from cryptography.hazmat.primitives import serialization as forms

        if self.own():
            raise StoreError(f"found a key of yours in {self.path}, needed none: it would be lost")
        secret = _ed25519().Ed25519PrivateKey.generate()
        pem = secret.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
        public: str = secret.public_key().public_bytes_raw().hex()
        self.trust(public, name)
        self._folder.write(_SECRET, pem)
        return public

    def own(self) -> str | None:
        """The public half of this user's own key."""
        secret = self._secret()
        return secret.public_key().public_bytes_raw().hex() if secret else None

    def trusted(self) -> dict[str, str]:
        """The trusted keys and their names.

        Raises:
            StoreError: the file is not as it was written.
        """
        try:
            lines = self._folder.read(_TRUSTED, _LIMIT).decode().splitlines()
        except FileNotFoundError:
            return {}
        found = dict(line.split(" ", 1) for line in lines if " " in line)
        if len(found) != len(lines) or not all(KEY.fullmatch(key) for key in found):
            raise StoreError(f"found {self.path}/{_TRUSTED} in another form, needed lines of 64 digits and a name")
        return found

    def trust(self, public: str, name: str) -> None:
        """Loads from now on what this key has signed."""
        if not KEY.fullmatch(public):
            raise StoreError(f"found {public[:80]!r}, needed a public key: 64 hexadecimal digits")
        if not NAME.fullmatch(name):
            raise StoreError(f"found {name[:120]!r}, needed a name: letters, digits, spaces and . @ + - _")
        self._write(self.trusted() | {public: name})

    def untrust(self, key: str) -> str:
        """Takes trust back, by public key or by name; the public key.

        Raises:
            StoreError: no such key is trusted, or several have this name.
        """
        trusted = self.trusted()
        if len(found := [public for public, name in trusted.items() if key in (public, name)]) != 1:
            raise StoreError(f"found {len(found)} trusted keys {key!r}, needed one")
        self._write({public: name for public, name in trusted.items() if public != found[0]})
        return found[0]

    def seal(self, manifest: Manifest) -> bytes:
        """The manifest, signed by this user's own key.

        Raises:
            StoreError: this user has none.
        """
        secret = self._secret()
        if secret is None:
            raise StoreError(f"found no key of yours in {self.path}, needed one to sign: fluxfire megacache key new")
        data = manifest.encode()
        signature = secret.sign(_PURPOSE + data).hex()
        public = secret.public_key().public_bytes_raw().hex()
        return data + canonical({"key": public, "signature": signature}).encode() + b"\n"

    def _secret(self) -> Ed25519PrivateKey | None:
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        with contextlib.suppress(FileNotFoundError):
            pem = self._folder.read(_SECRET, _LIMIT)
            try:
                secret = load_pem_private_key(pem, None)
            except (ValueError, TypeError):
                secret = None
            if not isinstance(secret, ed25519.Ed25519PrivateKey):
                raise StoreError(f"found {self.path}/{_SECRET}, no ed25519 key")
            return secret
        return None

    def _write(self, trusted: dict[str, str]) -> None:
        self._folder.write(_TRUSTED, "".join(f"{public} {name}\n" for public, name in trusted.items()).encode())


def unseal(sealed: bytes, key: str, trusted: dict[str, str]) -> tuple[Manifest, str]:
    """The manifest of the entry `key`, and the trusted key that signed it.

    Raises:
        StoreError: it is not signed, or not by a trusted key, or it is none of this entry.
    """
    at = sealed.find(b"\n") + 1
    data, rest = sealed[:at], sealed[at:]
    found = _SIGNATURE.fullmatch(rest)
    if not at or not found:
        raise StoreError(f"found {key[:12]} without a signature, needed one by a key that you trust")
    public, signature = found[1].decode(), bytes.fromhex(found[2].decode())
    if public not in trusted:
        how = f"fluxfire megacache key trust {public} NAME, if you know whose it is: who holds it can run code here"
        raise StoreError(f"found {key[:12]} signed by {public[:12]}, whom you do not trust: {how}")
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, _PURPOSE + data)
    except (InvalidSignature, ValueError):
        raise StoreError(
            f"found {key[:12]} with a signature that is not of {trusted[public]}: it was changed"
        ) from None
    return Manifest.decode(data, key), public


def default_folder() -> Path:
    """Fluxfire's folder among this user's settings."""
    settings = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(settings):  # the standard: a relative one is invalid
        settings = os.path.expanduser("~/.config")
    return Path(os.path.realpath(settings)) / "fluxfire" / "keys"


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError:
        how = "pip install 'fluxfire[megacache]'"
        raise StoreError(f"found no cryptography, needed it for what comes from elsewhere: {how}") from None
    return ed25519
