"""All rows of the table of coverage."""

import coverage_language
import coverage_layers
import coverage_uses
import coverage_vision

ROWS = [*coverage_layers.ROWS, *coverage_uses.ROWS, *coverage_vision.ROWS, *coverage_language.ROWS]
