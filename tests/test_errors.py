"""A mistake of the user is one exception type, and a name that is nearly right is pointed out."""

import pytest

from revjax.errors import CheckpointError, ConfigError, DataError, RevjaxError, RunFolderError, nearest
from revjax.models import preset


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, RunFolderError])
def test_every_mistake_is_a_revjax_error_and_a_value_error(kind):
    assert issubclass(kind, RevjaxError) and issubclass(kind, ValueError)


@pytest.mark.parametrize("name", ["num_layer", "NUM_LAYERS", "numlayers", "layers_num_layers"])
def test_the_nearest_name_is_suggested(name):
    assert nearest(name, ["d_model", "num_layers"]) == " Did you mean 'num_layers'?"


def test_a_preset_is_changed_in_fields_that_there_are():
    with pytest.raises(
        TypeError, match="A decoder has no 'layers'. Did you mean 'num_layers'. It has family, d_model, "
    ):
        preset("decoder-tiny", layers=3)
    assert preset("decoder-tiny", num_layers=3).num_layers == 3


@pytest.mark.parametrize("known", [[], ["d_model"]])
def test_nothing_is_suggested_where_nothing_is_near(known):
    assert nearest("temperature", known) == ""
