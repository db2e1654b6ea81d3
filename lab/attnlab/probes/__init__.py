"""Each probe measures one thing of a run and yields results; none of them writes."""
