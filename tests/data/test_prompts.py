import json
import random

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from data.prompts import read_prompts
from data.scenes import Scene, caption, numbered_edit

TEXTS = ["a red ball", "", "a blue cube", "a red ball", "   ", "  a green cone  ", "a blue cube"]
DISTINCT = ("a red ball", "a blue cube", "a green cone")


def table(name="TEXT"):
    return Dataset.from_dict({"id": range(len(TEXTS)), name: [text or None for text in TEXTS]})


def write_text(path):
    path.write_text("\n".join(TEXTS) + "\n")


SOURCES = {
    "prompts.txt": write_text,
    "captions.parquet": lambda path: table().to_parquet(path),
    "captions.csv": lambda path: table().to_csv(path),
    "captions.jsonl": lambda path: table().to_json(path),
    "saved": lambda path: table().save_to_disk(path),
    "saved_splits": lambda path: DatasetDict({"train": table()}).save_to_disk(path),
    "folder": lambda path: (path.mkdir(), table().to_parquet(path / "train.parquet")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_prompts(tmp_path, name):
    SOURCES[name](tmp_path / name)
    prompts = read_prompts(str(tmp_path / name), column="TEXT")
    assert prompts.texts == DISTINCT
    assert (prompts.empty, prompts.duplicates) == (2, 2)
    assert len(prompts.sha256) == 64


def test_num_prompts_counts_those_that_stay(tmp_path):
    write_text(tmp_path / "prompts.txt")
    prompts = read_prompts(str(tmp_path / "prompts.txt"), num_prompts=2)
    assert prompts.texts == DISTINCT[:2]
    assert (prompts.empty, prompts.duplicates) == (1, 0)  # nothing after the second one was read
    with pytest.raises(ValueError, match=r"3 usable prompts \(2 empty and 2 repeated ones left out\), expected 4"):
        read_prompts(str(tmp_path / "prompts.txt"), num_prompts=4)


def test_scenes_are_captions_of_their_split():
    prompts = read_prompts("scenes:validation", num_prompts=300)
    captions = [caption(Scene.random(seed, "validation"), random.Random(seed)).text for seed in range(1000)]
    assert list(prompts.texts) == list(dict.fromkeys(captions))[:300]
    assert read_prompts("scenes:validation", 20).texts == prompts.texts[:20]


def test_the_hash_knows_the_order(tmp_path):
    hashes = set()
    for texts in (["a b", "c"], ["c", "a b"], ["a", "b", "c"]):
        (tmp_path / "prompts.txt").write_text("\n".join(texts))
        hashes.add(read_prompts(str(tmp_path / "prompts.txt")).sha256)
    assert len(hashes) == 3


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="0 usable prompts"):
        read_prompts(str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "scenes:train"}, ValueError, "say how many"),
        ({"source": "scenes:dev", "num_prompts": 3}, ValueError, "train, validation, test"),
        ({"source": "scenes:train", "num_prompts": 0}, ValueError, "num_prompts=0"),
        ({"source": "missing.txt"}, FileNotFoundError, "no such file"),
        ({"source": "missing.parquet"}, FileNotFoundError, "no such file"),
        ({"source": "/missing/folder"}, FileNotFoundError, "no such file"),
        ({"source": "missing.parquet", "image_column": "image"}, FileNotFoundError, "no such file"),
        ({"source": "edits:test", "num_prompts": 3, "image_column": "image"}, ValueError, "image_column='image'"),
        ({"source": "scenes:test", "num_prompts": 3, "image_column": "image"}, ValueError, "image_column='image'"),
        ({"source": __file__, "image_column": "image"}, ValueError, "image_column='image'"),
    ],
)
def test_bad_sources_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        read_prompts(**arguments)


def test_edits_come_with_the_scenes_they_lead_to():
    prompts = read_prompts("edits:test", 5)
    assert list(zip(prompts.texts, prompts.sources, prompts.edited, strict=True)) == [
        numbered_edit(n, "test") for n in range(5)
    ]
    assert read_prompts("scenes:test", 5).edited is None


def test_a_row_without_a_picture_is_named(tmp_path):
    rows = Dataset.from_dict(
        {"say": ["dye it"], "image": [None]}, Features({"say": Value("string"), "image": Image()})
    )
    rows.to_parquet(tmp_path / "edits.parquet")
    with pytest.raises(ValueError, match="'image' has no picture for 'dye it'"):
        read_prompts(str(tmp_path / "edits.parquet"), column="say", image_column="image")


def test_bad_columns_and_splits_are_named(tmp_path):
    table().to_parquet(tmp_path / "captions.parquet")
    with pytest.raises(ValueError, match="no column 'caption'; it has id, TEXT"):
        read_prompts(str(tmp_path / "captions.parquet"), column="caption")
    with pytest.raises(ValueError, match="'id' holds int"):
        read_prompts(str(tmp_path / "captions.parquet"), column="id")
    DatasetDict({"train": table()}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        read_prompts(str(tmp_path / "saved"), column="TEXT", split="test")


def test_a_streamed_table_without_a_schema_has_columns_too(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    assert read_prompts(str(tmp_path / "captions.json")).texts == DISTINCT


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a red ball\r\na red ball\r\na blue cube\r\n".encode("utf-8-sig"))
    prompts = read_prompts(str(tmp_path / "prompts.txt"))
    assert prompts.texts == ("a red ball", "a blue cube") and prompts.duplicates == 1


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("un château rouge\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt' is not UTF-8 text: .* at byte 5"):
        read_prompts(str(tmp_path / "prompts.txt"))
