"""What the entries of a split are: folders, lists, COCO files and VOC, each opened as a Source of images and labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np

from utils.data.coco import CocoSource, open_coco
from utils.data.labels import Finding, Source, shown_path
from utils.data.listing import Finder, Folders, foreign_photos, is_foreign_photo, is_image, walked
from utils.data.voc import VocSource, image_name
from utils.data.yolo_text import TextSource, have_labels, label_path, labels_lie_beside
from utils.structures import DatasetSpec, UserError

ENTRY_KINDS = "a folder of images, a .txt list of images, a COCO .json, a VOC list of ids or a folder of VOC .xml"

TWICE = "image listed twice in the split: counted twice"
SHARED_LABELS = "shares its label file with another image"
NO_IMAGE = "label file without an image"
NO_ANNOTATION = "no annotation file: taken as background"
EMPTY_ENTRY = "no image in it"
FOREIGN_PHOTO = "cannot be read: convert it to .jpg or .png: image skipped"

_IMAGE_FOLDERS = ("JPEGImages", "images", "Images")  # beside a folder of VOC .xml
_NO_LABELS = re.compile(
    r"readme.*|license.*|classes|predefined_classes|notes|labels|train|val|valid|test|obj|_darknet", re.I
)
_FLAGGED_ID = re.compile(r"(\S.*?)\s+(?:-1|0|1)")  # a line of VOC's lists of one class


def open_split(spec: DatasetSpec, split: str) -> tuple[Source, ...]:
    """The sources of a split, one for each entry that holds images, in a stable order.

    Raises UserError: where it looked, and what it expected.
    """
    entries = spec.train if split == "val" and spec.val_fraction else getattr(spec, split)
    if not entries:
        raise UserError(f"{spec.source}: it has no '{split}' split")
    folders = Folders()
    opened = [_open(entry, spec, split, folders) for entry in entries]
    sources = [source for source in opened if len(source.images)]
    if not sources:
        raise UserError(f"{spec.source}: {_why_no_image(split, entries, opened)}")
    found = [
        Finding(file=shown_path(entry), line=0, problem=EMPTY_ENTRY)
        for entry, source in zip(entries, opened)
        if not len(source.images)
    ]
    found += chain.from_iterable(source.findings for source in opened)
    if spec.val_fraction and split != "test":
        sources = _share(spec, split, sources)
        found = found if split == "train" else []  # val's are said of train, whose folders these are
    first, *others = sources
    return replace(first, findings=tuple(found)), *(replace(source, findings=()) for source in others)


def _why_no_image(split: str, entries: Sequence[Path], opened: Sequence[Source]) -> str:
    looked = ", ".join(map(shown_path, entries))
    photos = [one.file for source in opened for one in source.findings if one.problem == FOREIGN_PHOTO]
    if photos:
        return f"none of the photos for '{split}' can be read; convert them to .jpg or .png; first: {photos[0]}"
    if all(isinstance(source, CocoSource) for source in opened):
        return f"'{split}': {looked}: lists no images"
    return f"no image found for '{split}' in {looked}; expected {ENTRY_KINDS}"


def _share(spec: DatasetSpec, split: str, sources: Sequence[Source]) -> list[Source]:
    """The part of train that is `split`, where val is a fraction of it."""
    lengths = [len(source.images) for source in sources]
    names = chain.from_iterable(source.images for source in sources)
    fractions = np.fromiter(map(_name_fraction, names), np.float64, sum(lengths))
    in_split = _is_val(fractions, spec.val_fraction) == (split == "val")
    if not in_split.any():
        none = f"none of the {len(in_split):,} images"
        raise UserError(f"{spec.source}: 'val: {spec.val_fraction}' leaves '{split}' {none}")
    shares = np.split(in_split, np.cumsum(lengths)[:-1])
    return [source.chosen(share) for source, share in zip(sources, shares) if share.any()]


def _is_val(fractions: np.ndarray, share: float) -> np.ndarray:
    """(n,) bool: those below `share`; of few images the lowest, or all but the highest, so that no side has none."""
    is_val = fractions < share
    if not is_val.any():
        is_val = fractions == fractions.min()
    elif is_val.all():
        is_val = fractions < fractions.max()
    alone = is_val.all() or not is_val.any()  # files of one name stay together
    return fractions < share if alone else is_val


def _name_fraction(image: str) -> float:
    """A number in [0, 1) that depends on the file name alone, so that a split survives added images and moves."""
    name = image[image.rfind(os.sep) + 1 :]
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "big") / 2**64


def _open(entry: Path, spec: DatasetSpec, split: str, folders: Folders) -> Source:
    if os.path.isdir(entry):
        return _open_folder(_labelled(os.fspath(entry)), spec, folders)
    if os.path.isfile(entry) and entry.suffix.lower() == ".txt":
        return _open_list(entry, spec, folders)
    if os.path.isfile(entry) and entry.suffix.lower() == ".json":
        finder = Finder(_coco_folders(entry, spec.root, split), folders)
        return open_coco(entry, spec.names, finder.find)
    problem = "cannot be used" if os.path.lexists(entry) else "not found"
    raise UserError(f"{spec.source}: '{split}': {shown_path(entry)} {problem}; expected {ENTRY_KINDS}")


def _coco_folders(file: Path, root: Path, split: str) -> list[str]:
    """Where the images of a COCO file may lie, the likeliest first: `annotations/instances_train2017.json` is known to
    lie beside `train2017` and `images/train2017`."""
    subset = file.stem.rpartition("_")[2]
    below = ("", subset, f"images{os.sep}{subset}", split, f"images{os.sep}{split}", "images")
    bases = dict.fromkeys(os.fspath(folder) for folder in (file.parent, root, file.parent.parent))
    return [os.path.join(base, folder) if folder else base for base in bases for folder in below]


# ---- folders ------------------------------------------------------------------------------------------------------


def _labelled(folder: str) -> str:
    """A folder, or where the links in its path lead, if the labels are known from there alone."""
    target = os.path.realpath(folder)
    return target if target != folder and not have_labels(folder) and have_labels(target) else folder


def _open_folder(folder: str, spec: DatasetSpec, folders: Folders) -> Source:
    images, annotations, foreign = [], [], []
    for where, names in walked(folder):
        here = list(filter(is_image, names))
        images += [f"{where}{os.sep}{name}" for name in here]
        annotations += [f"{where}{os.sep}{name}" for name in names if name[-4:].lower() == ".xml" and name[0] != "."]
        foreign += [f"{where}{os.sep}{name}" for name in foreign_photos(names, here)]
    if annotations and not _have_text(images, folders):
        source = _voc_folder(folder, images, annotations, spec, folders)
    else:
        source = _text_source(images, spec, folders)
    found = [Finding(file=shown_path(photo), line=0, problem=FOREIGN_PHOTO) for photo in foreign]
    return replace(source, findings=tuple(found))


def _text_source(images: Sequence[str], spec: DatasetSpec, folders: Folders) -> TextSource:
    homes = _folders_of(images)
    beside = frozenset(folder for folder in homes if labels_lie_beside(folder))
    source = TextSource(images=images, beside=beside, category_ids=(-1,) * len(spec.names))
    respelled = {}
    for where in dict.fromkeys(_label_folder(source, folder) for folder in homes):
        found = folders.respelled(where, ".txt").items()
        respelled |= {f"{where}{os.sep}{expected}": f"{where}{os.sep}{name}" for expected, name in found}
    return replace(source, respelled=respelled)


def _label_folder(source: TextSource, images: str) -> str:
    """Where the labels of the images in a folder lie."""
    probe = replace(source, images=[f"{images}{os.sep}x.jpg"])
    return probe.label_file(0)[: -len("x.txt") - 1]


def _folders_of(paths: Iterable[str]) -> dict[str, None]:
    """Folders, each once, in a stable order."""
    return dict.fromkeys(path[: path.rfind(os.sep)] for path in paths)


def _have_text(images: Sequence[str], folders: Folders) -> bool:
    """Whether any of the images has YOLO text; in a folder with VOC .xml, that decides which of the two it is."""
    for image in images:
        if any(_is_there(text, folders) for text in (label_path(image), f"{image[: image.rfind('.')]}.txt")):
            return True
    return False


def _voc_folder(
    folder: str, images: Sequence[str], annotations: Sequence[str], spec: DatasetSpec, folders: Folders
) -> VocSource:
    paired = [_image_of(annotation, folder, folders) for annotation in annotations]
    taken = set(paired)
    alone = [image for image in images if image not in taken]
    return VocSource(
        images=paired + alone,
        label_files=[*annotations, *(f"{image[: image.rfind('.')]}.xml" for image in alone)],
        category_ids=(-1,) * len(spec.names),
    )


def _image_of(annotation: str, entry: str, folders: Folders) -> str:
    """The image of a VOC .xml: beside it, or in a folder of images beside its folder, by its stem or by `filename`."""
    where, name = annotation[: annotation.rfind(os.sep)], annotation[annotation.rfind(os.sep) + 1 : -4]
    found = folders.image(where, name)
    if found:
        return found
    above, below = where[: where.rfind(os.sep)], where[len(entry) :]
    beside = [f"{above}{os.sep}{kind}" for kind in _IMAGE_FOLDERS]
    beside += [f"{entry[: entry.rfind(os.sep)]}{os.sep}{kind}{below}" for kind in _IMAGE_FOLDERS]
    for place in beside:
        found = folders.image(place, name)
        if found:
            return found
    called = image_name(annotation) or ""
    called = called[max(called.rfind("/"), called.rfind("\\")) + 1 :]
    for place in (where, *beside):
        if called in folders.names(place):
            return f"{place}{os.sep}{called}"
    likely = next((place for place in beside if folders.names(place)), where)
    return f"{likely}{os.sep}{name}.jpg"


# ---- lists --------------------------------------------------------------------------------------------------------


def _open_list(file: Path, spec: DatasetSpec, folders: Folders) -> Source:
    lines = _list_lines(file)
    if not lines or any(map(_names_image, lines)):
        finder = Finder([os.fspath(spec.root), os.fspath(file.parent)], folders)
        return _text_source(list(map(finder.find, lines)), spec, folders)
    above = (*list(file.parents)[:3][::-1], spec.root)  # ImageSets/Main/train.txt: two folders up, or fewer
    root = next((folder for folder in above if (folder / "Annotations").is_dir()), None)
    if root is None:
        raise UserError(
            f"{file}: {lines[0]!a} is no image file such as a.jpg, and for a VOC list of ids there is no "
            f"folder Annotations two levels up, in {file.parent.parent.parent}"
        )
    return _voc_list(lines, os.fspath(root), spec, folders)


def _list_lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
    except OSError:
        data = b"\0"
    if b"\0" in data:
        raise UserError(f"{file}: cannot be read as a list of images, one path per line")
    # names are bytes, as they are in folders; editors on Windows put a byte order mark first
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    return [stripped for line in lines if (stripped := line.strip())]


def _names_image(line: str) -> bool:
    return is_image(line[max(line.rfind("/"), line.rfind("\\")) + 1 :])


def _voc_list(lines: Sequence[str], root: str, spec: DatasetSpec, folders: Folders) -> VocSource:
    annotations, images = f"{root}{os.sep}Annotations", f"{root}{os.sep}JPEGImages"
    flagged = [_FLAGGED_ID.fullmatch(line) for line in lines]
    if all(flagged) and not _is_there(f"{annotations}{os.sep}{lines[0]}.xml", folders):
        lines = [match[1] for match in flagged]
    files = [_spelled(f"{annotations}{os.sep}{line}.xml", folders) for line in lines]
    found = [_image_of_id(line, images, folders) for line in lines]
    lost = [file for file in files if not _is_there(file, folders)]
    return VocSource(
        images=found,
        label_files=files,
        findings=tuple(Finding(file=shown_path(file), line=0, problem=NO_ANNOTATION) for file in lost),
        category_ids=(-1,) * len(spec.names),
    )


def _image_of_id(line: str, images: str, folders: Folders) -> str:
    path = f"{images}{os.sep}{line}"
    cut = path.rfind(os.sep)
    return folders.image(path[:cut], path[cut + 1 :]) or f"{path}.jpg"


def _spelled(path: str, folders: Folders) -> str:
    """The path of an .xml or .txt as its folder spells the ending, which may be .XML."""
    cut = path.rfind(os.sep) + 1
    return path[:cut] + folders.respelled(path[: cut - 1], path[-4:]).get(path[cut:], path[cut:])


def _is_there(path: str, folders: Folders) -> bool:
    path = _spelled(path, folders)
    cut = path.rfind(os.sep)
    return path[cut + 1 :] in folders.names(path[:cut])


# ---- findings -----------------------------------------------------------------------------------------------------


def split_findings(spec: DatasetSpec, split: str, sources: Sequence[Source]) -> list[Finding]:
    """What is wrong with the listing of a split: entries, images and label files, none of them opened."""
    findings = _shared_entries(spec, split)
    findings += chain.from_iterable(source.findings for source in sources)
    images = list(chain.from_iterable(source.images for source in sources))
    findings += [Finding(file=shown_path(image), line=0, problem=TWICE) for image in _repeated(images)]
    texts = [source for source in sources if isinstance(source, TextSource)]
    for source in texts:
        findings += _shared_labels(source)
    if not (spec.val_fraction and split == "val"):  # said of train, whose folders these are
        lists = {os.fspath(entry) for entry in (*spec.train, *spec.val, *spec.test)}  # text, and no labels
        findings += [finding for finding in _labels_alone(texts) if finding.file not in lists]
    return findings


def _shared_entries(spec: DatasetSpec, split: str) -> list[Finding]:
    before = {"train": (), "val": ("train",), "test": ("train", "val")}[split]
    return [
        Finding(file=shown_path(entry), line=0, problem=f"entry of '{split}' and of '{other}'")
        for other in before
        for entry in getattr(spec, split)
        if entry in getattr(spec, other)
    ]


def _repeated(paths: Sequence[str]) -> list[str]:
    """Those that are there more than once; 8 bytes for each while it looks."""
    digests = np.fromiter(map(hash, paths), np.int64, len(paths))
    ranked = np.sort(digests)
    alike = np.isin(digests, ranked[1:][ranked[1:] == ranked[:-1]])
    seen, repeated = set(), {}
    for place in np.flatnonzero(alike).tolist():
        if paths[place] in seen:
            repeated[paths[place]] = None
        seen.add(paths[place])
    return list(repeated)


def _shared_labels(source: TextSource) -> list[Finding]:
    """Images such as a.jpg and a.png, of which one was probably left over."""
    labels = source.label_files
    shared = set(_repeated(labels))
    if not shared:
        return []
    alike = {image: labels[place] for place, image in enumerate(source.images) if labels[place] in shared}
    several = {}
    for label in alike.values():
        several[label] = several.get(label, 0) + 1
    return [
        Finding(file=shown_path(image), line=0, problem=SHARED_LABELS)
        for image, label in alike.items()
        if several[label] > 1  # not the same image twice
    ]


def _labels_alone(sources: Sequence[TextSource]) -> list[Finding]:
    """Label files in the folders of the labels, without an image in the folder of the images, listed or not."""
    findings, seen = [], set()
    for source in sources:
        for folder in _folders_of(source.images):
            where = _label_folder(source, folder)
            if where not in seen:
                seen.add(where)
                findings += [Finding(file=shown_path(path), line=0, problem=NO_IMAGE) for path in _alone(where, folder)]
    return findings


def _alone(labels: str, images: str) -> list[str]:
    folders = Folders()
    with_image = {name[: name.rfind(".")] for name in folders.names(images) if is_image(name) or is_foreign_photo(name)}
    return [
        f"{labels}{os.sep}{name}"
        for name in sorted(folders.names(labels))
        if name[-4:].lower() == ".txt" and name[0] != "." and name[:-4] not in with_image
        if not _NO_LABELS.fullmatch(name[:-4])
    ]
