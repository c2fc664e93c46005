"""Run folders, checksums, the cache of finished chunks, workers and progress bars. Independent of the stages."""
