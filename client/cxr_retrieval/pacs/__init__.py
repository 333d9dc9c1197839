"""In the hospital's own network: films come by DICOM, and answers go back so."""
