"""autojac against torch's own ways, interleaved in one run."""
