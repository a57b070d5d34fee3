"""Files by name: folders walked, and what lists and annotation files call an image matched to what lies on the disk.

Paths are plain str, as there may be millions; a folder is read once, and its files are not asked for one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from utils.data.images import IMAGE_SUFFIXES

_FOREIGN_SUFFIXES = frozenset(  # of cameras and telephones
    ".3fr .arw .cr2 .cr3 .crw .dng .heic .heif .hif .iiq .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf .srw"
    " .x3f".split()
)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files are nobody's."""
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in IMAGE_SUFFIXES and name[0] != "."


def is_foreign_photo(name: str) -> bool:
    """Whether a file name is that of a photo which OpenCV cannot decode."""
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in _FOREIGN_SUFFIXES and name[0] != "."


def foreign_photos(names: Sequence[str], images: Sequence[str]) -> list[str]:
    """Of the files of a folder, of which some are images, the photos that cannot be decoded and are not there as images
    too: cameras may save a .jpg beside their own format."""
    if len(images) == len(names):
        return []
    found = list(filter(is_foreign_photo, names))
    stems = {name[: name.rfind(".")] for name in images} if found else ()
    return [name for name in found if name[: name.rfind(".")] not in stems]


def walked(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Folders to the bottom, behind links too, with the names of their files; in a stable order."""
    for where, folders, names in os.walk(folder, followlinks=True):
        # .ipynb_checkpoints holds copies
        folders[:] = sorted(name for name in folders if name[0] != "." and not _leads_up(where, name))
        yield where, sorted(names)


def _leads_up(where: str, name: str) -> bool:
    """Whether a folder is a link to one that holds it, which would go on for ever."""
    path = os.path.join(where, name)
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(where)
    return here == target or here.startswith(target.rstrip(os.sep) + os.sep)


class Folders:
    """What lies in folders, each read once."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._images: dict[str, dict[str, str]] = {}
        self._respelled: dict[tuple[str, str], dict[str, str]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """The names in a folder; none where it cannot be read."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):  # a NUL is a ValueError
                self._names[folder] = frozenset()
        return self._names[folder]

    def respelled(self, folder: str, ending: str) -> dict[str, str]:
        """Names such as x.TXT by what they stand in for, x.txt, where that is not there itself; `ending` is `.txt`."""
        key = folder, ending
        if key not in self._respelled:
            names, cut = self.names(folder), -len(ending)
            others = [name for name in names if not name.endswith(ending) and name[cut:].lower() == ending]
            self._respelled[key] = {
                wanted: name for name in sorted(others) if (wanted := f"{name[:cut]}{ending}") not in names
            }
        return self._respelled[key]

    def image(self, folder: str, stem: str) -> str | None:
        """The path of the image of that stem in a folder."""
        if f"{stem}.jpg" in self.names(folder):
            return f"{folder}{os.sep}{stem}.jpg"
        if folder not in self._images:
            images = sorted((name for name in self.names(folder) if is_image(name)), reverse=True)
            self._images[folder] = {name[: name.rfind(".")]: name for name in images}
        name = self._images[folder].get(stem)
        return None if name is None else f"{folder}{os.sep}{name}"


class Finder:
    """Finds files by names that were true elsewhere: relative to one of `bases`, perhaps without their first folders.

    Lists come with `data/obj_train_data/x.jpg` for what lies in `obj_train_data`, with the absolute paths of another
    machine, and with those of Windows.
    """

    def __init__(self, bases: Sequence[str], folders: Folders | None = None) -> None:
        self._bases = list(dict.fromkeys(base.rstrip(os.sep) or os.sep for base in bases))
        self._folders = folders or Folders()
        self._places: dict[str, list[str]] = {}
        self._likeliest: dict[str, str] = {}

    def find(self, entry: str) -> str:
        """The path of a file; where there is none, the one that a user would expect."""
        if os.sep != "/":
            entry = entry.replace("/", os.sep)
        path = self._existing(entry)
        if path is None and os.sep == "/" and "\\" in entry:
            entry = entry.replace("\\", "/")
            path = self._existing(entry)
        return path if path is not None else self._expected(entry)

    def _existing(self, entry: str) -> str | None:
        cut = entry.rfind(os.sep) + 1
        name = entry[cut:]
        for place in self._places_of(entry[:cut]):
            if name in self._folders.names(place):
                return f"{place}{os.sep}{name}"
        return None

    def _expected(self, entry: str) -> str:
        cut = entry.rfind(os.sep) + 1
        prefix = entry[:cut]
        if prefix not in self._likeliest:
            places = self._places_of(prefix) or self._candidates(prefix)
            with_images = (place for place in places if any(map(is_image, self._folders.names(place))))
            self._likeliest[prefix] = next(with_images, places[0])
        return f"{self._likeliest[prefix]}{os.sep}{entry[cut:]}"

    def _places_of(self, prefix: str) -> list[str]:
        """The folders there are that `prefix`, which ends with a separator or is empty, may stand for; best first."""
        if prefix not in self._places:
            places = dict.fromkeys(self._candidates(prefix))
            self._places[prefix] = [place for place in places if os.path.isdir(place)]
        return self._places[prefix]

    def _candidates(self, prefix: str) -> list[str]:
        parts = [part for part in prefix.split(os.sep) if part not in ("", ".")]
        whole = [os.sep.join([base, *parts]) for base in self._bases]
        if os.path.isabs(prefix):
            whole = [(os.sep if prefix[0] == os.sep else "") + os.sep.join(parts)]
        shorter = range(1, len(parts) + 1)
        return whole + [os.sep.join([base, *parts[dropped:]]) for dropped in shorter for base in self._bases]
