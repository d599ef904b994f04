"""Feature maps strip by strip: how they are cut, and what is read around a strip."""
