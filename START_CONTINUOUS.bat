@echo off
rem Train forever on every GPU of this machine, on fresh bars. Settings: the top of continuous_training.py.
rem
rem   START_CONTINUOUS.bat                      as set there
rem   START_CONTINUOUS.bat --demo               simulated market, small model, no keys, no GPU
rem   START_CONTINUOUS.bat --envs-per-gpu 256   one setting for this start
rem   START_CONTINUOUS.bat data                 any other command, here: show what bars there are
rem
rem Ctrl+C finishes the epoch, saves and exits; a second one ends at once. When Windows asks afterwards
rem "Terminate batch job (Y/N)?", the training is saved already: either answer is fine.
rem Works from any folder. set NOPAUSE=1 keeps the window from waiting for a key after an error.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0"
set "PYTHONUTF8=1"

set "PY="
set "PYARGS="
call :try py -3
if not defined PY call :try python
if not defined PY call :try .venv\Scripts\python.exe
if not defined PY (
  echo Python 3.11 or newer is needed and was not found.
  echo Install it from python.org, then start again.
  set "RC=9009"
  goto :end
)

"%PY%" %PYARGS% -m runtime.install requirements_simple.txt
set "RC=%ERRORLEVEL%"
if not "%RC%"=="0" goto :end
".venv\Scripts\python.exe" -m runtime.supervisor %*
set "RC=%ERRORLEVEL%"

:end
if not "%RC%"=="0" echo Ended with exit code %RC%.
if not "%RC%"=="0" if not defined NOPAUSE pause
endlocal & exit /b %RC%

rem :try PROGRAM [ARGUMENT] takes it for PY if it is a Python that is new enough. The Microsoft Store's
rem placeholder fails here and is passed over.
:try
"%~1" %~2 -c "import sys; sys.exit(sys.version_info[:2] in [(3, minor) for minor in range(11)])" >nul 2>nul
if errorlevel 1 exit /b 0
set "PY=%~1"
set "PYARGS=%~2"
exit /b 0
