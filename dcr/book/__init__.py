"""What a reader meets: notebook parameters, explorers, the report, make reproduce."""
