"""Methods side by side: the same data, backbone, budget and seeds for each, one table and one picture in the end."""
