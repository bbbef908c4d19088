"""Networks of the EDM / PFGM++ family and their storage."""
