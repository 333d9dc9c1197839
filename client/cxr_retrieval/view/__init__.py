"""The page that shows a query: a local web application on the running Triton and Milvus."""
