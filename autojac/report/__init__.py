"""What was found, as pictures. They need plotly: `pip install 'autojac[report]'`."""

from autojac.report.spy import spy

__all__ = ["spy"]
