"""The report's page: its data (`facts`), its charts (`charts`), and page.html, page.css, page.js."""
