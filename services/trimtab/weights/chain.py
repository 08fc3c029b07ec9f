"""The chain of a delta: the whole version it goes back to, and every delta from there to it. The base of an adapter."""

import re

from trimtab.weights.catalog import Catalog, Model
from trimtab.weights.errors import CorruptVersionError, ParentMissingError, WrongParentError
from trimtab.weights.layout import check_name
from trimtab.weights.manifest import Manifest


def chain_of(catalog: Catalog, manifest: Manifest) -> list[Manifest]:
    """From the whole version to ``manifest``, both included.

    Raises ParentMissingError, WrongParentError if a parent's content is not what the delta was made for, OSError.
    """
    chain = [manifest]
    while chain[-1].kind == "delta":
        chain.append(_parent(catalog, chain[-1]))
    return chain[::-1]


def base_of(catalog: Catalog, manifest: Manifest) -> Manifest:
    """The version that an adapter goes with, of any run.

    Raises ParentMissingError, WrongParentError if its content is not what the adapter was trained on, OSError.
    """
    version, found = manifest.version, re.fullmatch(r"([^/@]+)/([^/@]+)@(\d{1,12})", manifest.parent or "")
    if found is None:
        raise CorruptVersionError(f"{version} is an adapter whose base {manifest.parent} cannot be: publish it again")
    base = catalog.find(Model(check_name("run id", found[1]), check_name("model name", found[2])), int(found[3]))
    if base is None:
        raise ParentMissingError(
            f"{version} is an adapter on {manifest.parent}, which is not in {catalog.backend.url}: copy it there too"
        )
    if base.version.digest != manifest.parent_digest:
        raise WrongParentError(
            f"{version} is an adapter on {manifest.parent_digest}, but {manifest.parent} is {base.version.digest}"
        )
    return base


def _parent(catalog: Catalog, child: Manifest) -> Manifest:
    version = child.version
    model = Model(version.run_id, version.name)
    name, _, step = (child.parent or "").rpartition("@")
    if name != str(model) or not step.isdecimal() or int(step) >= version.step:
        raise CorruptVersionError(f"{version} is a delta whose parent {child.parent} cannot be: publish it again")
    parent = catalog.find(model, int(step))
    if parent is None:
        raise ParentMissingError(
            f"{version} is a delta on {child.parent}, which is not in {catalog.backend.url}: "
            "copy it there too, or publish a full version"
        )
    if parent.version.digest != child.parent_digest:
        raise WrongParentError(
            f"{version} is a delta on {child.parent_digest}, but {child.parent} is {parent.version.digest}: "
            "publish a full version"
        )
    return parent
