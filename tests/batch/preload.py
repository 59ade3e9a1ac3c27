"""What worker processes need; imported once, before they are forked."""

import search_foundation.cli
import search_foundation.commands.serve  # noqa: F401 - as all that follow
import services.batch.capability
import services.core.access
import services.core.inference
import services.core.modeling.registry  # noqa: F401
