"""Takes the picture ``report.png`` of the page that the quickstart writes; needs selenium, chromium and chromedriver.

python examples/quickstart.py --no-open && python docs/figures/make_report.py report.html
"""

import shutil
import sys
from pathlib import Path

from selenium import webdriver

options = webdriver.ChromeOptions()
options.binary_location = shutil.which("chromium")
for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,800"):
    options.add_argument(argument)
driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
driver.get(Path(sys.argv[1]).resolve().as_uri() + "#query-1")
driver.save_screenshot(str(Path(__file__).parent / "report.png"))
driver.quit()
