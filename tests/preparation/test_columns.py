import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lory_jax.preparation.engine.columns import (
    Ragged,
    TextWriter,
    read_array,
    read_ragged,
    write_array,
    write_ragged,
)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5), (3, 3), (0, 0), (6, 7), (7, 7)])
def test_any_range_of_rows_is_read(tmp_path, start, stop):
    array = np.arange(21, dtype=np.int32).reshape(7, 3)
    pieces = [np.arange(i, dtype=np.uint16) for i in range(7)]
    write_array(tmp_path, "a", array)
    write_ragged(tmp_path, "r", Ragged.of(pieces, np.uint16))
    np.testing.assert_array_equal(read_array(tmp_path, "a", start, stop), array[start:stop])
    found = read_ragged(tmp_path, "r", start, stop)
    assert len(found) == len(pieces[start:stop])
    for i, piece in enumerate(pieces[start:stop]):
        np.testing.assert_array_equal(found[i], piece)


def test_columns_without_columns_have_rows(tmp_path):
    write_array(tmp_path, "a", np.zeros((4, 0), np.float32))
    assert read_array(tmp_path, "a", 1, 3).shape == (2, 0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.data())
def test_strings_come_back_in_any_order(strings, data):
    order = data.draw(st.permutations(range(len(strings))))
    column = Ragged.of_strings(strings)
    assert column.strings() == strings
    assert column.take(np.array(order, int)).strings() == [strings[i] for i in order]
    both = Ragged.joined([column, column], np.uint8)
    assert both.strings() == strings * 2


def test_texts_are_written_row_by_row(tmp_path):
    writer = TextWriter(tmp_path, "text")
    for text in ("", "a", "日本語", ""):
        writer.append(text.encode())
    writer.close()
    assert read_ragged(tmp_path, "text").strings() == ["", "a", "日本語", ""]
    assert read_ragged(tmp_path, "text", 1, 3).strings() == ["a", "日本語"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.npy", "text_starts.npy"]
