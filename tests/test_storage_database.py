from attnlab_storage.database import Store, revision


def test_open(store: Store):
    assert revision(store) == 0
