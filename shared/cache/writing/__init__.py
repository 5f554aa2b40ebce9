"""What changes a cache: rows and targets written part by part, parts taken over, rows dropped, rubbish removed."""
