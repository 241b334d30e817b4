"""What a single file written by weightport says of its models' configs.

Names and shapes tell most of a config. What they do not tell, such as the number of heads, goes to
the header of the file, if a reader would take it for something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import ConversionError
from ...io.documents import parse_json

KEY = "weightport.configs"

Options = Mapping[str, Any]


def stated_configs(metadata: Mapping[str, str]) -> dict[str, Options]:
    """Class -> options of its config, from the header of a file."""
    try:
        found = parse_json(metadata.get(KEY, "{}"), KEY)
    except ConversionError:
        return {}
    return {name: options for name, options in found.items() if isinstance(options, dict)}


def configs_metadata(written: Mapping[str, Options]) -> dict[str, str]:
    """The entry of a header for class -> options; none where there is nothing to say."""
    unsaid = {name: options for name, options in written.items() if options}
    return {KEY: json.dumps(unsaid, sort_keys=True)} if unsaid else {}
