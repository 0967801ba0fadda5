"""Schema revisions, oldest first in `autojac.store.models.SCHEMA_VERSIONS`."""
