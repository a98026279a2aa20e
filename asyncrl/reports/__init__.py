"""What a run did, read again: reports, traces, and the pages they are shown on."""
