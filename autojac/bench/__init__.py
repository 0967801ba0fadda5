"""autojac against torch's own ways, other libraries and other frameworks, in turns."""
