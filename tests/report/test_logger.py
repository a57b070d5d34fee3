import pytest

from tests.report.logged import logged_run


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 10, 11, 19, 40, 300])
def test_a_run_is_pictured_from_its_first_to_its_last_epoch_up_to_ten_times(tmp_path, epochs):
    run = logged_run(tmp_path, epochs=epochs)
    pictured = [epoch for epoch in range(1, epochs + 1) if run.is_pictured(epoch)]
    assert pictured[0] == 1 and pictured[-1] == epochs
    assert min(epochs, 6) <= len(pictured) <= 10


@pytest.mark.parametrize(("every", "shown"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7])])
def test_pictures_at_intervals_of_ones_own(tmp_path, every, shown):
    run = logged_run(tmp_path, epochs=7, bbox_interval=every)
    assert [epoch for epoch in range(1, 8) if run.is_pictured(epoch)] == shown
