"""The shortest way through everything."""

from tests.hub import FaultHub
from tests.models import make_archive, make_tree


def test_model_reads_as_published(hub: FaultHub, mount) -> None:
    tree = make_tree()
    hub.add("google/demo/1", make_archive(tree))
    mounted = mount(hub)
    for name, content in tree.items():
        assert (mounted.path / "google/demo/1" / name).read_bytes() == content
    assert len(hub.body_requests("google/demo/1")) == 1
