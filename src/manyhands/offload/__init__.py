"""Where state lives between its uses, and what it costs in memory."""
