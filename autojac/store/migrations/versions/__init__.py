"""Schema revisions, oldest first in `autojac.store.tables.SCHEMA_VERSIONS`."""
